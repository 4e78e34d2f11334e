"""`stream-app segments`: look at the segment definitions."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stream_app.commands.options import (
    closing,
    configured,
    json_output,
    print_json,
    print_table,
    printable,
    read_settings,
)
from stream_app.errors import ConfigError

if TYPE_CHECKING:
    from stream_app.core.segment import Segment


@click.group(epilog=closing("stream-app segments check"))
def segments() -> None:
    """Look at the segment definitions, and at who is in."""


@segments.command(
    epilog=closing("stream-app segments check", "stream-app segments check --segments draft.toml")
)
@json_output
@configured
def check(as_json: bool, config: Path | None, segments: Path | None) -> int:
    """Check the definitions without touching any service.

    Says what is wrong with segments.toml under the weights of app.toml (exit code 2), and what is allowed but
    probably not meant: a segment that one event can never enter, one that excludes all of its own members.
    """
    from stream_app.core.segment_advice import Advice, advice
    from stream_app.settings import load_settings

    try:
        settings = load_settings(config, segments)
    except ConfigError as error:
        if as_json:
            print_json({"problems": list(error.problems), "segments": [], "advice": []})
        raise
    hints = advice(settings.segments, settings.weights.core)
    if not settings.model.enabled:
        text = "stays empty while [model] enabled is false"
        hints += [Advice(s.id, "type", text) for s in settings.segments if s.type == "discovery"]
    if as_json:
        print_json(
            {
                "problems": [],
                "segments": [
                    {**asdict(segment), "version": segment.version} for segment in settings.segments
                ],
                "advice": [asdict(hint) for hint in hints],
            }
        )
        return 0
    print_table(
        ["segment", "type", "criteria", "enters at", "leaves below", "excluded by"],
        [_row(segment) for segment in settings.segments],
    )
    click.echo()
    for hint in hints:
        click.echo(f"advice: {hint}")
    count = len(settings.segments)
    click.echo(
        f"{count} segment{'' if count == 1 else 's'}, no problems, "
        + (f"{len(hints)} to think about." if hints else "nothing to think about.")
    )
    return 0


@segments.command("list", epilog=closing("stream-app segments list"))
@json_output
@configured
def list_(as_json: bool, config: Path | None, segments: Path | None) -> int:
    """List the segments with how many users are in them now.

    Of discovery segments it says how well first engagements of their labels were predicted lately, each
    before the model had learned from it: how often one of them was among the first ten of all labels that
    the user had not engaged (hit@10), and the mean of 1/rank (MRR).
    """
    from stream_app.lookup import Lookup

    settings = read_settings(config, segments)
    with Lookup(settings.redis.connection_url, cluster=settings.redis.cluster) as lookup:
        counts = {segment.id: lookup.member_count(segment.id) for segment in settings.segments}
        accuracy = lookup.accuracy()
    if as_json:
        print_json(
            {
                "segments": [
                    {
                        **asdict(segment),
                        "version": segment.version,
                        "members": counts[segment.id],
                        "accuracy": accuracy.segments.get(segment.id),
                    }
                    for segment in settings.segments
                ],
                "accuracy": accuracy.tasks,
            }
        )
        return 0
    print_table(
        ["segment", "members", "name", "criteria", "predicted"],
        [
            [s.id, counts[s.id], s.name, _row(s)[2], _predicted(s, accuracy.segments.get(s.id))]
            for s in settings.segments
        ],
    )
    for task, name in (("next", "next category"), ("discovery", "first engagement")):
        figures = accuracy.tasks.get(task, {})
        if figures.get("examples"):
            click.echo(
                f"\nmodel, {name}, last {figures['examples']:,.0f}: hit@1 {figures['hit@1']:.3f}, "
                f"hit@5 {figures['hit@5']:.3f}, hit@10 {figures['hit@10']:.3f}, MRR {figures['mrr']:.3f} "
                f"(by popularity {figures['popularity_mrr']:.3f}, Markov {figures['markov_mrr']:.3f}), "
                f"log loss {figures['log_loss']:.3f}, ECE {figures['ece']:.3f}",
                nl=False,
            )
    if accuracy.tasks:
        click.echo()
    return 0


def _predicted(segment: Segment, figures: Mapping[str, float] | None) -> str:
    if segment.type != "discovery":
        return "-"
    if not figures or not figures["examples"]:
        return "nothing yet"
    return f"hit@10 {figures['hit@10']:.3f}, MRR {figures['mrr']:.3f} of {figures['examples']:,.0f}"


@segments.command(epilog=closing("stream-app segments members snack-lovers --limit 20"))
@click.argument("segment_id", metavar="ID")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Members at most (default: all).")
@json_output
@configured
def members(
    segment_id: str, limit: int | None, as_json: bool, config: Path | None, segments: Path | None
) -> int:
    """Print the users who are in a segment, and when each will leave if nothing happens."""
    from stream_app.adapters.codec import rfc_3339
    from stream_app.lookup import Lookup

    settings = read_settings(config, segments)
    if segment_id not in {segment.id for segment in settings.segments}:
        known = ", ".join(segment.id for segment in settings.segments)
        raise click.BadParameter(f"expected one of {known}, got {segment_id!r}", param_hint="ID")
    with Lookup(settings.redis.connection_url, cluster=settings.redis.cluster) as lookup:
        found = islice(lookup.members(segment_id), limit)
        rows = [(m.user_id, None if m.exits_at_ms is None else rfc_3339(m.exits_at_ms)) for m in found]
    if as_json:
        members = [{"user_id": user_id, "exits_at": exits_at} for user_id, exits_at in rows]
        print_json({"segment_id": segment_id, "members": members})
        return 0
    for user_id, exits_at in rows:
        click.echo(f"{printable(user_id)}\t{exits_at or 'never by decay'}")
    return 0


def _row(segment: Segment) -> list[str]:
    from stream_app.core.discovery import exit_weight_of

    is_base = segment.type == "base"
    criteria = []
    if segment.labels:
        criteria.append(f"{segment.match_labels if is_base else 'all'} of {len(segment.labels)} labels")
    if segment.asset_ids:
        criteria.append(f"{segment.match_assets if is_base else 'any'} of {len(segment.asset_ids)} assets")
    if segment.event_types:
        criteria.append("types " + ", ".join(segment.event_types))
    exit_weight = segment.min_weight if segment.exit_weight is None else segment.exit_weight
    return [
        segment.id,
        segment.type,
        " and ".join(criteria),
        _threshold(segment.min_weight) if is_base else f"{segment.min_weight:g}",
        _threshold(exit_weight) if is_base else f"{exit_weight_of(segment):g}",
        ", ".join(segment.exclude) or "-",
    ]


def _threshold(weight: float) -> str:
    return "any history" if weight == 0 else f"{weight:g}"
