"""`stream-app show`: what the service knows of one user."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stream_app.commands.options import (
    closing,
    configured,
    duration_text,
    json_output,
    print_json,
    print_table,
    printable,
    read_settings,
)

if TYPE_CHECKING:
    from stream_app.lookup import UserView

MOST_SHOWN = 20


@click.command(epilog=closing("stream-app show h1228", "stream-app show h1228 --json"))
@click.argument("user")
@json_output
@configured
def show(user: str, as_json: bool, config: Path | None, segments: Path | None) -> int:
    """Show a user's weights as they are now, and the segments that the user is in.

    Weights are decayed to now; with the event clock, to the time that the replay has reached. A user who is
    unknown, or whose history has faded away, is said to be so (exit code 1).
    """
    from stream_app.lookup import Lookup

    settings = read_settings(config, segments)
    with Lookup(settings.redis.url) as lookup:
        view = lookup.user(user)
    if as_json:
        print_json({"user_id": user, "known": False} if view is None else _document(view))
    elif view is None:
        click.echo("No history of this user: never seen, or faded away.")
    else:
        _print(view)
    return 1 if view is None else 0


def _document(view: UserView) -> dict[str, Any]:
    from stream_app.adapters.codec import rfc_3339

    return {
        "user_id": view.user_id,
        "known": True,
        "partition": view.partition,
        "now": rfc_3339(view.now_ms),
        "weights": {
            event_type: {"total": sums.total, "labels": sums.labels, "assets": sums.assets}
            for event_type, sums in view.weights.items()
        },
        "segments": [
            {
                "segment_id": membership.segment_id,
                "exits_at": None if membership.exits_at_ms is None else rfc_3339(membership.exits_at_ms),
            }
            for membership in view.segments
        ],
    }


def _print(view: UserView) -> None:
    from stream_app.adapters.codec import rfc_3339

    click.echo(f"partition {view.partition}, as of {rfc_3339(view.now_ms)}\n")
    print_table(
        ["segment", "leaves", "in"],
        [
            [m.segment_id, "never by decay", "-"]
            if m.exits_at_ms is None
            else [m.segment_id, rfc_3339(m.exits_at_ms), duration_text(m.exits_at_ms - view.now_ms)]
            for m in view.segments
        ],
    )
    rows = []
    for event_type, sums in view.weights.items():
        rows.append((sums.total, event_type, "(all)", ""))
        rows += [(weight, event_type, "label", name) for name, weight in sums.labels.items()]
        rows += [(weight, event_type, "asset", name) for name, weight in sums.assets.items()]
    rows.sort(key=lambda row: -row[0])
    click.echo()
    print_table(
        ["weight", "event type", "of", "name"],
        [
            [f"{weight:.4f}", printable(kind), of, printable(name)]
            for weight, kind, of, name in rows[:MOST_SHOWN]
        ],
    )
    if len(rows) > MOST_SHOWN:
        click.echo(f"and {len(rows) - MOST_SHOWN} more (--json shows all)")
