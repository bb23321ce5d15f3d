"""How the benchmarks measure: what is for GPUs runs here with a clock and a recorder that stand for CUDA's."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import graphs, launches, measure, options, runner
from benchmarks.providers.base import Setting
from tests.bench_workers import recorder

CPU = torch.device("cpu")


class CountingClock:
    """CUDA's events, where every call takes a millisecond and every event between calls a tenth of one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.synchronised = 0

    def event(self) -> Any:
        event = SimpleNamespace(time=0.0)

        def record() -> None:
            event.time = self.now
            self.now += 0.1

        event.record, event.elapsed_time = record, lambda end: end.time - event.time
        return event

    def synchronize(self) -> None:
        self.synchronised += 1

    def call(self) -> None:
        self.now += 1.0


def test_calls_on_a_gpu_are_queued_and_timed_by_events() -> None:
    clock = CountingClock()
    samples = measure._event_samples(clock.call, 4, False, clock)
    assert [sample.seconds for sample in samples] == pytest.approx([1.1e-3] * 4)
    assert clock.synchronised == 2, "before the first, and after the last"


def test_short_calls_have_no_events_between_them() -> None:
    clock = CountingClock()
    (sample,) = measure._event_samples(clock.call, 50, True, clock)
    assert sample.seconds == pytest.approx(50.1e-3 / 50)


def test_page_faults_are_counted() -> None:
    size = 1 << 20
    fresh = mmap.mmap(-1, size)
    fresh.madvise(mmap.MADV_NOHUGEPAGE)
    (sample,) = measure.call_samples(lambda: fresh.write(b"1" * size), 1, CPU)
    assert sample.seconds > 0
    assert sample.minor_faults >= size // mmap.PAGESIZE


def test_warming_up_ends_when_calls_no_longer_become_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    medians = iter([4.0, 2.0, 1.0, 0.99, 0.5])
    monkeypatch.setattr(
        measure, "call_samples", lambda call, calls, device: [measure.Sample(next(medians), 0, 0)] * calls
    )
    assert measure.warm_up(lambda: None, CPU, 60.0) == 0.99


def test_time_on_the_host_is_that_of_each_call() -> None:
    calls: list[int] = []
    seconds = measure.host_seconds(lambda: calls.append(1), 5, CPU)
    assert len(calls) == len(seconds) == 5
    assert min(seconds) > 0


def test_peak_memory_has_what_a_call_allocates() -> None:
    size = 64 << 20
    measure.reset_peak_memory(CPU)
    small = measure.peak_memory(lambda: None, CPU)
    large = measure.peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert large - small > size // 2


def test_kernels_are_told_from_copies_and_from_what_the_host_does() -> None:
    on_gpu, on_host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name="aten::relu", device_type=on_host, is_user_annotation=False),
        SimpleNamespace(name="conv_kernel", device_type=on_gpu, is_user_annotation=False),
        SimpleNamespace(name="Memcpy DtoD (Device -> Device)", device_type=on_gpu, is_user_annotation=False),
        SimpleNamespace(name="Memset (Device)", device_type=on_gpu, is_user_annotation=False),
        SimpleNamespace(name="a range", device_type=on_gpu, is_user_annotation=True),
        SimpleNamespace(name="bn_kernel", device_type=on_gpu, is_user_annotation=False),
    ]
    assert launches.count_kernels(events) == 2


def test_the_profilers_events_have_what_is_asked_of_them() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        torch.relu(torch.ones(2))
    events = profile.events()
    assert events
    assert launches.count_kernels(events) == 0
    assert launches.count_launches(lambda: None, CPU) is None


def test_long_steps_have_a_graph_for_each_batch() -> None:
    log: list[str] = []
    captured = graphs.capture(lambda a: a + 1, [(torch.tensor(1.0),), (torch.tensor(2.0),)], False, recorder(log))
    assert captured.steps == 1
    captured.call()
    captured.call()
    assert log == ["graph 0", "graph 1", "replay graph 1", "replay graph 0"], "the first batch is captured last"
    assert captured.first() == 2.0


def test_short_steps_share_a_graph() -> None:
    log: list[str] = []
    batches = [(torch.tensor(float(i)),) for i in range(3)]
    captured = graphs.capture(lambda a: a * 2, batches, True, recorder(log))
    assert captured.steps == 3
    batches[0][0].fill_(5.0)
    assert captured.first() == 10.0, "a replay computes with what is in the memory now"
    assert log == ["graph 0", "replay graph 0"]


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="graph: expected a GPU, got device cpu"):
        runner.recorder(Setting("inference", torch.float32, CPU, 1, graph=True))


def test_batches_are_larger_than_the_cache() -> None:
    assert runner.batches_beyond(50 << 20, 10 << 20) == 15
    assert runner.batches_beyond(50 << 20, 1 << 30) == runner.INPUTS
    assert runner.batches_beyond(50 << 20, 1000) == runner.MOST_INPUTS


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_numbers_on_command_lines_are_checked(text: str) -> None:
    with pytest.raises(Exception, match=f"expected a whole number above 0, got '{text}'"):
        options.positive(text)
    assert options.positive("3") == 3
