"""`stream-app segments`: look at the segment definitions."""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

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
    from stream_app.core.segment_advice import advice
    from stream_app.settings import load_settings

    try:
        settings = load_settings(config, segments)
    except ConfigError as error:
        if as_json:
            print_json({"problems": list(error.problems), "segments": [], "advice": []})
        raise
    hints = advice(settings.segments, settings.weights.core)
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
    """List the segments with how many users are in them now."""
    from stream_app.lookup import Lookup

    settings = read_settings(config, segments)
    with Lookup(settings.redis.url) as lookup:
        counts = {segment.id: lookup.member_count(segment.id) for segment in settings.segments}
    if as_json:
        print_json(
            {
                "segments": [
                    {**asdict(segment), "version": segment.version, "members": counts[segment.id]}
                    for segment in settings.segments
                ]
            }
        )
        return 0
    print_table(
        ["segment", "members", "name", "criteria"],
        [[s.id, counts[s.id], s.name, _row(s)[2]] for s in settings.segments],
    )
    return 0


@segments.command(epilog=closing("stream-app segments members snackers --limit 20"))
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
    with Lookup(settings.redis.url) as lookup:
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
    criteria = []
    if segment.labels:
        criteria.append(f"{segment.match_labels} of {len(segment.labels)} labels")
    if segment.asset_ids:
        criteria.append(f"{segment.match_assets} of {len(segment.asset_ids)} assets")
    if segment.event_types:
        criteria.append("types " + ", ".join(segment.event_types))
    exit_weight = segment.min_weight if segment.exit_weight is None else segment.exit_weight
    return [
        segment.id,
        segment.type,
        " and ".join(criteria),
        _threshold(segment.min_weight),
        _threshold(exit_weight),
        ", ".join(segment.exclude) or "-",
    ]


def _threshold(weight: float) -> str:
    return "any history" if weight == 0 else f"{weight:g}"
