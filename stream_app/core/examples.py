"""From the fold to the model: what a slice's events and users look like to it.

Decides what the model is shown of an event, and as of when of a user. It must not know what the model makes
of it. The worker and `stream-app evaluate` both come this way.
"""

from collections.abc import Mapping, Sequence

from stream_app.core.decay import Weights
from stream_app.core.event import Event
from stream_app.core.model import Example, History
from stream_app.core.profile import Profile
from stream_app.core.step import Applied

__all__ = ["examples_of", "histories_before"]


def histories_before(
    profiles: Mapping[str, Profile], events: Sequence[Event], weights: Weights
) -> dict[str, History]:
    """Return what is known of a slice's users at their first event in it, before the slice is folded.

    Parameters
    ----------
    profiles
        Those of the slice's users who have one.
    events
        The slice.
    weights
        The settings that the profiles are stored under.
    """
    first_ms: dict[str, int] = {}
    for event in events:
        first_ms.setdefault(event.user_id, event.event_time_ms)
    return {
        user_id: History.of(profiles[user_id], weights, at_ms)
        for user_id, at_ms in first_ms.items()
        if user_id in profiles
    }


def examples_of(applied: Sequence[Applied], weights: Weights) -> list[Example]:
    """Return the records that the model can learn from: those with labels that were no duplicates."""
    examples = []
    # What an event without labels has done to a history is told with the user's next one that has some.
    begun: set[str] = set()
    forgot: dict[str, History] = {}
    for record, _, fresh, left in applied:
        event = record.event
        user_id = event.user_id
        if event.labels:
            known = forgot.pop(user_id, None) if forgot else None
            if begun and user_id in begun:
                begun.discard(user_id)
                fresh = True
            amount = weights.action_weight(event.event_type)
            examples.append(
                Example(
                    user_id,
                    event.event_type,
                    event.event_time_ms,
                    event.labels,
                    event.asset_id,
                    fresh,
                    amount,
                    None if fresh else known,
                )
            )
        elif fresh:
            begun.add(user_id)
            forgot.pop(user_id, None)
        if left is not None:
            forgot[user_id] = History.of(left, weights, event.event_time_ms)
    return examples
