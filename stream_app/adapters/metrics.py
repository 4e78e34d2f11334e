"""Name every metric of the worker once: kind, meaning, and what to do when it rises.

Must not know who counts, or how the numbers leave the process (`stream_app.adapters.health` serves them).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]


class Metrics:
    """The worker's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter(
            "stream_app_events",
            "Valid records folded, duplicates included. Falls to 0 with lag above 0: see holds.",
            registry=self.registry,
        )
        self.dead_letters = Counter(
            "stream_app_dead_letters",
            "Records set aside, by reason. Rising: read the dead-letter topic and correct the producer.",
            ["reason"],
            registry=self.registry,
        )
        self.transitions = Counter(
            "stream_app_transitions",
            "Transitions committed, by status and cause.",
            ["status", "cause"],
            registry=self.registry,
        )
        self.discoveries = Counter(
            "stream_app_discoveries",
            "Discovery segments, by outcome: entered; converted, who engaged what was recommended; left, who "
            "did not. converted / (converted + left) is what the segment is worth.",
            ["segment", "outcome"],
            registry=self.registry,
        )
        self.holds = Counter(
            "stream_app_holds",
            "Times a partition dropped its work and claimed anew, by failure. Rising: Redis or Kafka is ill; "
            "after worker.hold_deadline_s the worker stops.",
            ["failure"],
            registry=self.registry,
        )
        self.exit_lateness_s = Histogram(
            "stream_app_exit_lateness_seconds",
            "Wall clock: how long after its instant and the grace the timer fired an exit.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0),
            registry=self.registry,
        )
        self.partitions = Gauge(
            "stream_app_partitions", "Partitions claimed by this worker.", registry=self.registry
        )
        self.lag = Gauge(
            "stream_app_lag_records",
            "Records in the log and not yet folded, by partition. Rising: add partitions and workers.",
            ["partition"],
            registry=self.registry,
        )

        self.examples_lost = Counter(
            "stream_app_model_examples_lost",
            "Records folded and not learned from: a worker was killed after its last checkpoint. Rising: see "
            "why workers are killed.",
            registry=self.registry,
        )
        self.accuracy = Gauge(
            "stream_app_model_accuracy",
            "Figures of the model's last predictions, each made before its event was learned from: task "
            "(next, discovery), figure (hit@1, hit@5, hit@10, mrr, log_loss, ece, and mrr of the baselines "
            "beside it). Falling below a baseline: people have changed, or the labels have.",
            ["task", "figure"],
            registry=self.registry,
        )
        self.segment_accuracy = Gauge(
            "stream_app_model_segment_accuracy",
            "The same, of first engagements of the labels that a discovery segment names.",
            ["segment", "figure"],
            registry=self.registry,
        )

    def summary(self) -> str:
        """Say in one line what this worker has done so far."""

        def total(counter: Counter) -> int:
            samples = [s for metric in counter.collect() for s in metric.samples if s.name.endswith("_total")]
            return int(sum(sample.value for sample in samples))

        return (
            f"folded {total(self.events)} events, set {total(self.dead_letters)} records aside, "
            f"said {total(self.transitions)} transitions"
        )
