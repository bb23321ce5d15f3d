"""The rows of what a provider did with a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.measure import Sample
from benchmarks.providers import PROVIDERS, Setting
from benchmarks.records import Conditions, Record, Roofline, Subject
from benchmarks.runner import Findings
from benchmarks.workload import summarise_errors

LEFT_OUT = "left_out"
"""The metric of a provider that has no speed, and need not be tried again: 1 where it failed or was wrong, 0 where it
has nothing to offer."""


def subject(case: Case, provider: str, setting: Setting) -> Subject:
    """What the rows are about."""
    shape, dtype = records.shape_text(case.inputs[0]), records.dtype_text(setting.dtype)
    return Subject(case.level, case.name, provider, setting.mode, shape, dtype, PROVIDERS[provider].layout)


def metric(name: str, setting: Setting) -> str:
    """The name of a metric that graphs have beside calls."""
    return f"graph_{name}" if setting.graph else name


def rows(
    subject: Subject,
    setting: Setting,
    errors: Mapping[str, float],
    samples: Sequence[Sample],
    found: Findings,
    cost: Roofline | None,
    conditions: Conditions,
) -> list[Record]:
    """The time, and what was found out besides; of a model's graph the time alone: its calls have rows of their own."""
    times = [sample.seconds for sample in samples]
    time = subject.record(metric("time", setting), times, "s", conditions, cost)
    if setting.graph and setting.level == "model":
        return [time]
    quantities: dict[str, tuple[Sequence[float] | None, str]] = {
        "minor_faults": ([sample.minor_faults for sample in samples], "1"),
        "system_time": ([sample.system_seconds for sample in samples], "s"),
        "peak_memory": ([found.peak_memory], "B"),
        "launches": (None if found.launches is None else [found.launches], "1"),
        "host_time": (found.host_seconds, "s"),
        **{f"error_{quantity}": ([error], "1") for quantity, error in summarise_errors(errors).items()},
    }
    return [time] + [
        subject.record(name, values, unit, conditions) for name, (values, unit) in quantities.items() if values
    ]
