"""`stream-app evaluate`: how well the model predicts events that are known already.

What is judged, and how, is in `stream_app.evaluation`; here its reports are shown.
"""

# ruff: noqa: PLC0415  (what is slow to import waits until the verb runs)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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

if TYPE_CHECKING:
    from stream_app.evaluation.figures import Figures
    from stream_app.evaluation.files import EventFile
    from stream_app.evaluation.offline import Judge
    from stream_app.evaluation.prequential import Judgement, Report
    from stream_app.settings import Settings

TITLES: Final = {
    "next": "next category",
    "discovery": "discovery",
    "model": "the model",
    "popularity": "popularity",
    "first_times": "popularity of first times",
    "decayed_popularity": "decayed popularity",
    "markov": "Markov",
    "own_weights": "own weights",
    "ease": "EASE, offline",
    "item_knn": "item-KNN, offline",
    "logistic": "logistic, offline",
}
#: What the model is shown beside, tenth by tenth.
BESIDE: Final = {"next": ("markov", "own_weights"), "discovery": ("markov", "first_times")}
STEPS: Final = "▁▂▃▄▅▆▇█"


@click.command(
    epilog=closing(
        "stream-app evaluate events.jsonl.gz",
        "stream-app evaluate --sample-users 4 january.jsonl february.jsonl",
        "stream-app evaluate --sort --leave-out return --leave-out refund shop.jsonl --json",
    )
)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
)
@click.option(
    "--sample-users",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the users whose CRC-32 of the user_id is divisible by N: about every N-th.",
)
@click.option(
    "--leave-out",
    multiple=True,
    default=("return",),
    show_default=True,
    metavar="TYPE",
    help="An event type that is not judged; may be given several times, '' leaves out none.",
)
@click.option("--sort", is_flag=True, help="Sort a file by its timestamps; reads it into memory first.")
@json_output
@configured
def evaluate(
    files: tuple[str, ...],
    sample_users: int | None,
    leave_out: tuple[str, ...],
    sort: bool,
    as_json: bool,
    config: Path | None,
    segments: Path | None,
) -> int:
    """Judge the next-category model on files of events: predict each one, then learn from it.

    FILE is JSON, one event a line in the order of time, gzipped or not; "-" is standard input. Each is a
    stream of its own and meets a new model, with the code, the settings and the batches of the worker.
    Neither Kafka nor Redis is needed.

    "Next category" ranks all labels that the stream has shown before an event. "Discovery" ranks only those
    that the user has not engaged, at each event that brings a known user a new one. MRR is the mean of
    1/rank (1.0: always first), hit@5 the share of events with a rank of at most 5, ECE how far the score of
    the first is from how often it came true (0: exactly right), "last 20 %" the MRR on the last fifth of the
    events. The baselines are judged in the same way. Offline recommenders, which a checkout of the source
    has in tests/, learn from the first 80 % at once and are judged on the rest.

    A line that is no event is refused, named at the end, and makes the exit code 1.
    """
    from stream_app.adapters.event_lines import STDIN
    from stream_app.evaluation.files import EventFile
    from stream_app.evaluation.offline import offline_judge

    settings = read_settings(config, segments)
    if files.count(STDIN) > 1:
        raise click.UsageError("standard input can be read only once")
    offline = offline_judge()
    documents = []
    refused = 0
    for path in files:
        file = EventFile(path, leave_out=leave_out, sample_users=sample_users, sort=sort)
        report = _evaluated(path, file, settings, offline)
        refused += file.refused
        if as_json:
            documents.append(_document(path, file, sample_users, report))
        else:
            if path != files[0]:
                click.echo()
            _print(path, file, sample_users, report)
        for refusal in file.refusals:
            click.echo(f"refused {refusal.name}:{refusal.line}: {refusal.reason}", err=True)
        if file.refused > len(file.refusals):
            click.echo(f"refused {file.refused - len(file.refusals):,} more lines, not named", err=True)
    if as_json:
        print_json({"streams": documents})
    return 1 if refused else 0


def _evaluated(path: str, file: EventFile, settings: Settings, offline: Judge | None) -> Report:
    from threadpoolctl import threadpool_limits

    from stream_app.adapters.event_lines import input_name
    from stream_app.adapters.transport import SLICE_RECORDS
    from stream_app.commands.replay import progress_display
    from stream_app.evaluation.prequential import evaluate_stream

    threadpool_limits(limits=1, user_api="blas")  # as the worker
    with progress_display(f"evaluate {printable(input_name(path))}") as on_progress:
        return evaluate_stream(file.slices(SLICE_RECORDS, on_progress), settings.weights.core, offline)


def _document(path: str, file: EventFile, sample_users: int | None, report: Report) -> dict[str, Any]:
    return {
        "file": path,
        "sample_users": sample_users,
        "left_out": dict(file.left_out),
        "refused": file.refused,
        **report.document(),
    }


def _print(path: str, file: EventFile, sample_users: int | None, report: Report) -> None:
    sample = "" if sample_users is None else f" (a sample: 1 in {sample_users})"
    line = f"{printable(path)}: {report.events:,} events, {report.users:,} users{sample}"
    line += f", {report.labels:,} labels"
    if report.duplicates:
        line += f"; {report.duplicates:,} duplicates passed over"
    for event_type, count in file.left_out.items():
        line += f'; left out: {count:,} of type "{printable(event_type)}"'
    click.echo(line)
    for task, judgement in report.model.items():
        click.echo()
        _print_task(task, judgement, report)
    if report.forgotten:
        click.echo(
            f"Not among the discoveries, since the user's history had been forgotten: {report.forgotten:,}."
        )
    click.echo()
    _print_learning(report)
    click.echo()
    if report.offline is None:
        click.echo(
            "Offline recommenders: not installed; a checkout of the source has them in tests/offline.py."
        )
    elif not report.offline:
        click.echo("Offline recommenders: too little to learn from, or too much for their dense tables.")
    lift = report.lift
    if lift.value is None:
        click.echo(
            "Lift of the top decile of growth weight: no first engagement in 30 days that were looked at."
        )
    else:
        click.echo(
            f"Lift of the top decile of growth weight: {lift.value:.2f}. Of the users who have not engaged a "
            "label,\nthe tenth with the largest weight engages it within 30 days that many times as often as "
            f"all of them\n({lift.instants} instants)."
        )
    if report.model_us is not None and report.fold_us is not None:
        click.echo(
            f"Processor time per event: {report.model_us:.0f} µs for scoring and learning, "
            f"{report.fold_us:.0f} µs for the fold."
        )


def _print_task(task: str, judgement: Judgement, report: Report) -> None:
    rows = [_row("model", judgement)]
    rows += [_row(name, judgements[task]) for name, judgements in report.baselines.items()]
    if task == "discovery" and report.offline is not None:
        rows += [_row(name, found) for name, found in report.offline.items()]
    examples = 0 if judgement.whole is None else judgement.whole.examples
    print_table(
        [f"{TITLES[task]}, {examples:,} examples", "MRR", "hit@1", "hit@5", "hit@10", "ECE", "last 20 %"],
        rows,
    )


def _row(name: str, judgement: Judgement) -> list[str]:
    whole = judgement.whole
    figures = [None] * 5 if whole is None else [whole.mrr, whole.hit_1, whole.hit_5, whole.hit_10, whole.ece]
    return [TITLES.get(name, name), *(_number(figure) for figure in [*figures, judgement.last_20.mrr])]


def _print_learning(report: Report) -> None:
    """Print the MRR of each tenth of the stream, and a line that shows how it moves."""
    rows = []
    for task, names in BESIDE.items():
        lines = [("model", report.model[task].deciles)]
        lines += [(name, report.baselines[name][task].deciles) for name in names]
        all_of_task = [part for _, parts in lines for part in parts]
        for name, parts in lines:
            title = f"{TITLES[task]}: {TITLES[name]}"
            rows.append([title, *(_number(part.mrr) for part in parts), sparkline(parts, all_of_task)])
    print_table(["MRR by tenths of the stream", *map(str, range(1, 11)), ""], rows)


def sparkline(parts: Sequence[Figures], scale: Sequence[Figures]) -> str:
    """Draw MRRs as a line of blocks.

    Parameters
    ----------
    parts
        One a character; a blank where nothing was judged.
    scale
        The lowest block is the least MRR of these, the highest the largest.

    Examples
    --------
    >>> from stream_app.evaluation.figures import Figures
    >>> parts = [Figures(9, 0.1), Figures(0), Figures(9, 0.2), Figures(9, 0.3)]
    >>> sparkline(parts, parts)
    '▁ ▅█'
    """
    known = [part.mrr for part in scale if part.mrr is not None]
    if not known:
        return ""
    least, most = min(known), max(known)
    step = (most - least) / (len(STEPS) - 1) or 1.0
    return "".join(" " if part.mrr is None else STEPS[round((part.mrr - least) / step)] for part in parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
