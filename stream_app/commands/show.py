"""`stream-app show`: what the service knows of one user."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from stream_app.errors import ModelStateError

if TYPE_CHECKING:
    from stream_app.lookup import Meta, UserView
    from stream_app.settings import Settings

MOST_SHOWN = 20
MOST_CATEGORIES = 5
MOST_RECOMMENDED = 10
MOST_FEATURES = 4


@dataclass(frozen=True, slots=True)
class _Why:
    """What a user's scores are made of.

    Parameters
    ----------
    event_types
        Maps event type to its share of the user's label weights, from 0 to 1.
    features
        Maps recommended label to what each feature adds to its logit.
    """

    event_types: Mapping[str, float] = field(default_factory=dict)
    features: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@click.command(epilog=closing("stream-app show h1228", "stream-app show h1228 --json"))
@click.argument("user")
@json_output
@configured
def show(user: str, as_json: bool, config: Path | None, segments: Path | None) -> int:
    """Show a user's weights as they are now, the segments that the user is in, and what may come next.

    Weights are decayed to now; with the event clock, to the time that the replay has reached. Next categories
    rank all labels, recommendations those that the user has never engaged: growth is the probability among
    these, base among all. Under "because" stands what moved a recommendation most, as steps of log odds, by
    the model as of its last checkpoint. A user who is unknown, or whose history has faded away, is said to be
    so (exit code 1).
    """
    from stream_app.lookup import Lookup

    settings = read_settings(config, segments)
    with Lookup(settings.redis.connection_url, cluster=settings.redis.cluster) as lookup:
        view, meta = lookup.user(user), lookup.meta()
    if view is None:
        if as_json:
            print_json({"user_id": user, "known": False})
        else:
            click.echo("No history of this user: never seen, or faded away.")
        return 1
    why = _Why()
    if view.scores and settings.model.enabled:
        try:
            why = asyncio.run(_why(settings, view, meta))
        except ModelStateError as exc:
            click.echo(f"Why is not known: {exc}", err=True)
    if as_json:
        print_json(_document(view, why))
    else:
        _print(view, why)
    return 0


async def _why(settings: Settings, view: UserView, meta: Meta) -> _Why:
    """Ask the model, as it was last written down, why it recommends what it does."""
    from stream_app.adapters.learning import read_model
    from stream_app.adapters.redis_client import connect
    from stream_app.core.model import History

    client = connect(settings.redis.connection_url, cluster=settings.redis.cluster)
    try:
        model = await read_model(client, meta.weights, meta.partitions)
    finally:
        await client.aclose()
    total = sum(sum(sums.labels.values()) for sums in view.weights.values())
    history = History.of(view.profile, meta.weights, view.now_ms)
    tips = view.scores.recommendations if view.scores else ()
    return _Why(
        {name: sum(sums.labels.values()) / total for name, sums in view.weights.items()} if total else {},
        {tip.labels[0]: model.why(history, tip.labels[0]) for tip in tips},
    )


def _document(view: UserView, why: _Why) -> dict[str, Any]:
    from stream_app.adapters.codec import rfc_3339

    scores = view.scores
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
                "prediction": None
                if membership.prediction is None
                else {"labels": membership.prediction.labels, "score": membership.prediction.score},
            }
            for membership in view.segments
        ],
        "scored_at": None if scores is None else rfc_3339(scores.at_ms),
        "model_version": None if scores is None else scores.model_version,
        "next_categories": []
        if scores is None
        else [{"label": label, "score": score} for label, score in scores.next_categories],
        "recommendations": []
        if scores is None
        else [
            {
                "event_type": tip.event_type,
                "asset_id": tip.asset_id,
                "labels": tip.labels,
                "growth_weight": tip.growth_weight,
                "base_weight": tip.base_weight,
                "why": why.features.get(tip.labels[0], {}),
            }
            for tip in scores.recommendations
        ],
        "why": {"event_types": why.event_types},
    }


def _print(view: UserView, why: _Why) -> None:
    from stream_app.adapters.codec import rfc_3339

    click.echo(f"partition {view.partition}, as of {rfc_3339(view.now_ms)}\n")
    print_table(
        ["segment", "leaves", "in", "expected next"],
        [
            [
                m.segment_id,
                "never by decay" if m.exits_at_ms is None else rfc_3339(m.exits_at_ms),
                "-" if m.exits_at_ms is None else duration_text(m.exits_at_ms - view.now_ms),
                "-"
                if m.prediction is None
                else f"{printable(m.prediction.labels[0])} {m.prediction.score:.3f}",
            ]
            for m in view.segments
        ],
    )
    click.echo()
    _print_weights(view)
    if view.scores is not None:
        click.echo()
        _print_scores(view, why)


def _print_weights(view: UserView) -> None:
    rows = []
    for event_type, sums in view.weights.items():
        rows.append((sums.total, event_type, "(all)", ""))
        rows += [(weight, event_type, "label", name) for name, weight in sums.labels.items()]
        rows += [(weight, event_type, "asset", name) for name, weight in sums.assets.items()]
    rows.sort(key=lambda row: -row[0])
    print_table(
        ["weight", "event type", "of", "name"],
        [
            [f"{weight:.4f}", printable(kind), of, printable(name)]
            for weight, kind, of, name in rows[:MOST_SHOWN]
        ],
    )
    if len(rows) > MOST_SHOWN:
        click.echo(f"and {len(rows) - MOST_SHOWN} more (--json shows all)")


def _print_scores(view: UserView, why: _Why) -> None:
    from stream_app.adapters.codec import rfc_3339

    scores = view.scores
    if scores is None:
        return
    best = ", ".join(
        f"{printable(label)} {score:.3f}" for label, score in scores.next_categories[:MOST_CATEGORIES]
    )
    click.echo(f"next category, as of {rfc_3339(scores.at_ms)}: {best or 'nothing predicted yet'}\n")
    print_table(
        ["growth", "base", "never engaged", "asset", "likely", "because"],
        [
            [
                f"{tip.growth_weight:.4f}",
                f"{tip.base_weight:.4f}",
                printable(tip.labels[0]),
                printable(tip.asset_id or "-"),
                printable(tip.event_type),
                _because(why.features.get(tip.labels[0], {})),
            ]
            for tip in scores.recommendations[:MOST_RECOMMENDED]
        ],
    )
    if why.event_types:
        parts = sorted(why.event_types.items(), key=lambda part: -part[1])
        shares = ", ".join(f"{printable(name)} {share:.0%}" for name, share in parts)
        click.echo(f"\nall of it from a history of {shares}")


def _because(features: Mapping[str, float]) -> str:
    """Name what moved a score most.

    Examples
    --------
    >>> _because({"popularity": -1.25, "hour": 0.01, "last labels": 0.5})
    'popularity -1.25, last labels +0.50, hour +0.01'
    """
    strongest = sorted(features.items(), key=lambda part: -abs(part[1]))[:MOST_FEATURES]
    return ", ".join(f"{name} {amount:+.2f}" for name, amount in strongest) or "-"
