"""A run of the benchmarks: who is compared in which order, and what happens to providers that are wrong or fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pandas")

from benchmarks import add_relu, bn_act, conv_bn_act, harness, models, results, worker
from benchmarks.case import MODES, Case, Setting
from benchmarks.harness import Comparison, Plan
from benchmarks.providers import PROVIDERS
from benchmarks.worker import ProviderError, UnsuitableError, Worker
from tests.benchmarks import made_up

PLAN = Plan(rounds=3, turn=0.0, warmup=0.0)
LAYER = conv_bn_act.cases(["cifar_resnet20"], 2, 16)


@pytest.fixture
def planted() -> Iterator[None]:
    before = dict(PROVIDERS)
    made_up.plant()
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


def setting(mode: str = "inference", dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(mode, dtype, "cpu", 1)


def run(providers: list[str], mode: str = "inference", workers: Any = None, case: Case | None = None) -> Any:
    workers = workers or made_up.LocalWorkers()
    comparison = Comparison(case or LAYER[1], setting(mode), providers, PLAN, graph=False)
    return comparison, comparison.run(workers), workers


def metrics(rows: list[dict[str, Any]], provider: str) -> set[str]:
    return {row["metric"] for row in rows if row["provider"] == provider}


# Order


def test_every_name_comes_first_and_before_each_other_equally_often() -> None:
    names = ["a", "b", "c"]
    rounds = [harness.order(names, index) for index in range(6)]
    assert all(sorted(one) == names for one in rounds)
    assert sorted(one[0] for one in rounds) == ["a", "a", "b", "b", "c", "c"]
    for first, second in (("a", "b"), ("b", "c"), ("a", "c")):
        assert sum(one.index(first) < one.index(second) for one in rounds) == 3


def test_providers_take_turns() -> None:
    _, _, workers = run(["eager_nchw", "eager_channels_last"])
    turns = [entry.removeprefix("turn ") for entry in workers.log if entry.startswith("turn")]
    names = ["eager_nchw", "eager_channels_last"]
    assert turns == names + [name for index in range(3) for name in harness.order(names, index)]
    assert workers.log.index("prepare eager_channels_last") < workers.log.index("turn eager_nchw")


def test_a_provider_that_fails_in_its_turn_does_not_stop_the_others() -> None:
    comparison, rows, workers = run(["eager_nchw", "resfuse"], workers=made_up.LocalWorkers(broken=["eager_nchw"]))
    assert comparison.failed == {"eager_nchw": True}
    assert metrics(rows, "eager_nchw") == {"left_out"}
    assert workers.log.count("turn resfuse") == 4, "the first does not count"
    assert {"time", "peak_memory", "error_output"} <= metrics(rows, "resfuse")


# Correctness comes before speed


@pytest.mark.parametrize(("name", "mode"), [("wrong", "inference"), ("wrong_gradient", "full")])
def test_a_wrong_provider_gets_no_speed(
    planted: None, name: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison, rows, workers = run([name, "eager_nchw"], mode)
    assert comparison.failed == {name: True}
    assert metrics(rows, name) == {"left_out"}
    assert f"turn {name}" not in workers.log
    assert "time" in metrics(rows, "eager_nchw")
    assert f"{name} is left out: wrong: " in capsys.readouterr().out


@pytest.mark.usefixtures("planted")
def test_failing_and_having_nothing_to_offer_are_told_apart() -> None:
    comparison, rows, _ = run(["raises", "unsuitable", "eager_nchw"])
    assert comparison.failed == {"raises": True, "unsuitable": False}
    left_out = {row["provider"]: row["p50"] for row in rows if row["metric"] == "left_out"}
    assert left_out == {"raises": 1.0, "unsuitable": 0.0}
    assert "time" in metrics(rows, "eager_nchw")


@pytest.mark.parametrize("mode", MODES["conv_bn_act"])
@pytest.mark.parametrize("provider", ["eager_nchw", "eager_channels_last", "resfuse", "resfuse_nchw"])
def test_providers_are_correct_in_every_mode(provider: str, mode: str) -> None:
    """Also those with a residual; autocast in training, rounded parameters in inference."""
    residual = next(case for case in LAYER if len(case.shapes) == 2)
    bn, add = bn_act.cases(["cifar_resnet20"], 2, 16)[1], add_relu.cases(["cifar_resnet20"], 2, 16)[0]
    narrow, wide = torch.bfloat16, torch.float32
    for case, dtype in ((residual, wide), (residual, narrow), (bn, wide), (add, narrow)):
        comparison = Comparison(case, setting(mode, dtype), [provider], PLAN._replace(rounds=1), False)
        rows = comparison.run(made_up.LocalWorkers())
        assert not comparison.failed
        assert ("error_output" if mode in ("inference", "forward") else "error_grad") in metrics(rows, provider)
        if mode == "full" and case is residual:
            names = {"output", "grad input", "grad residual", "grad conv.weight", "grad bn.weight", "grad bn.bias"}
            assert set(comparison.errors[provider]) == names


@pytest.mark.parametrize("provider", ["eager_channels_last", "resfuse"])
def test_a_training_step_is_checked_in_every_gradient(provider: str) -> None:
    case = models.cases(["cifar_resnet8"], 2)[0]
    comparison, rows, _ = run([provider], "train", case=case)
    parameters = len(list(case.build().parameters()))
    assert len(comparison.errors[provider]) == 1 + parameters
    assert {"error_loss", "error_grad", "time"} <= metrics(rows, provider)


# Cases


def test_layers_of_a_network() -> None:
    found = models.layers("resnet50")
    assert sum(len(paths) for paths in found.values()) == 53
    stem, expand = next(iter(found)), next(layer for layer, paths in found.items() if "layer1.0.conv3" in paths)
    assert (stem.in_channels, stem.out_channels, stem.kernel, stem.output_extent) == (3, 64, 7, (112, 112))
    assert expand.residual and expand.relu and (expand.out_channels, expand.extent) == (256, (56, 56))
    projection = next(layer for layer, paths in found.items() if "layer1.0.downsample.0" in paths)
    assert not projection.residual and not projection.relu
    strided = next(layer for layer, paths in found.items() if "layer2.0.conv2" in paths)
    assert (strided.stride, strided.output_extent) == (2, (28, 28)), "ResNet v1.5: the stride is on the 3x3"


def test_cases_are_named_by_their_first_place() -> None:
    names = [case.name for case in conv_bn_act.cases(["resnet18"], 1)]
    assert names[:2] == ["resnet18 conv1 x1", "resnet18 layer1.0.conv1 x2"]
    ends = add_relu.cases(["resnet18"], 4)
    assert (ends[0].name, ends[0].shape) == ("resnet18 layer1.0 x2", "4x64x56x56")
    assert all(len(case.shapes) == 2 and case.shapes[0] == case.shapes[1] for case in ends)
    assert bn_act.cases(["resnet18"], 4)[0].shape == "4x64x112x112"


@pytest.mark.parametrize("name", ["cifar_resnet21", "cifar_resnet2", "no_such_network"])
def test_unknown_networks_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        models.cases([name], 1)


def test_the_work_of_a_case() -> None:
    from resfuse.roofline import DEVICES

    case = next(case for case in LAYER if len(case.shapes) == 2)
    found = harness.cost(case, setting(), DEVICES["h200"])
    n, c, h, w = case.shapes[1]
    assert found["flops"] == 2 * n * c * h * w * case.shapes[0][1] * 9
    assert found["bytes"] >= 4 * 3 * n * c * h * w
    rows = [{"metric": "time", "p50": 2 * found["seconds"]}, {"metric": "launches", "p50": 1.0}]
    harness.add_roofline(rows, found)
    assert rows[0]["roofline"] == pytest.approx(0.5)
    assert "roofline" not in rows[1]
    assert harness.cost(case, setting("backward"), DEVICES["h200"]) == {}


# Processes

ECHO = """
import os, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[3]))
while (request := connection.recv()) is not None:
    method, arguments = request
    if method == "crash":
        os._exit(3)
    if method == "hang":
        time.sleep(600)
    connection.send({"fail": ("failed", "Traceback"), "refuse": ("unsuitable", "no")}.get(method, ("done", arguments)))
"""


def test_a_process_that_crashes_or_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROGRAM", ECHO)
    with Worker("any") as one:
        assert one.ask("echo", 1, 2, timeout=60) == (1, 2)
        with pytest.raises(ProviderError, match="Traceback"):
            one.ask("fail", timeout=60)
        with pytest.raises(UnsuitableError):
            one.ask("refuse", timeout=60)
        with pytest.raises(ProviderError, match="hang took longer than 0 s"):
            one.ask("hang", timeout=0.3)
        assert not one.alive
        with pytest.raises(ProviderError):
            one.ask("echo", timeout=60)
    with Worker("any") as one, pytest.raises(ProviderError, match="ended with code 3"):
        one.ask("crash", timeout=60)


def test_workers_replace_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROGRAM", ECHO)
    workers = harness.Workers(threads=1, keep=True)
    first = workers.of("any")
    workers.rest()
    assert workers.of("any") is first, "small cases share a process"
    first.kill()
    second = workers.of("any")
    assert second is not first
    assert second.ask("echo", timeout=60) == ()
    workers.close()
    assert not second.alive


# Command lines


@pytest.mark.parametrize("op", MODES)
def test_help(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        harness.main(op, ["--help"])
    assert ended.value.code == 0
    assert f"python -m benchmarks.{op}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--model", "no_such_network"], ["--case", "no such case"], ["--graph"]]
)
def test_impossible_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        harness.main("models", ["--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def local(monkeypatch: pytest.MonkeyPatch) -> made_up.LocalWorkers:
    workers = made_up.LocalWorkers()
    monkeypatch.setattr(harness, "Workers", lambda threads, keep: workers)
    return workers


QUICK = ["--quick", "--device", "cpu", "--threads", "1", "--provider", "eager_channels_last", "resfuse"]


def test_a_quick_run_writes_its_rows_and_is_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = local(monkeypatch)
    assert harness.main("add_relu", [*QUICK, "--output", str(tmp_path)]) == 0
    rows = results.read(tmp_path / "add_relu.csv")
    assert set(rows["op"]) == {"add_relu", "ceiling"}
    times = rows[rows["metric"] == "time"]
    assert set(times["provider"]) == {"eager_channels_last", "resfuse"}
    assert (times["p20"] <= times["p50"]).all() and (times["p50"] <= times["p80"]).all()
    assert (times["roofline"] > 0).all()
    asked = len(workers.log)
    assert harness.main("add_relu", [*QUICK, "--output", str(tmp_path), "--resume"]) == 0
    assert len(workers.log) == asked
    assert "0 cases are left" in capsys.readouterr().out


def test_a_run_ends_within_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local(monkeypatch)
    assert harness.main("add_relu", [*QUICK, "--output", str(tmp_path), "--limit", "0.001"]) == 0
    assert "The time is up: 1 cases are left" in capsys.readouterr().out
    assert not (tmp_path / "add_relu.csv").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_a_run_in_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Providers that are wrong, raise or hang are left out of a run whose exit status says so."""
    program = worker.PROGRAM.replace(
        "worker.serve", "from tests.benchmarks import made_up; made_up.plant()\nworker.serve"
    )
    monkeypatch.setattr(worker, "PROGRAM", program)
    providers = ["eager_channels_last", "wrong", "raises", "hangs", "resfuse"]
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--output", str(tmp_path), "--timeout", "60"]
    assert harness.main("add_relu", [*arguments, "--provider", *providers]) == 1
    rows = results.read(tmp_path / "add_relu.csv")
    assert set(rows[rows["metric"] == "left_out"]["provider"]) == {"wrong", "raises", "hangs"}
    assert set(rows[rows["metric"] == "time"]["provider"]) == {"eager_channels_last", "resfuse"}


@pytest.mark.slow
def test_the_whole_of_make_bench_in_small(tmp_path: Path) -> None:
    from benchmarks import __main__ as everything

    assert everything.main(["--quick", "--output", str(tmp_path)]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert {"models.csv", "conv_bn_act.csv", "overhead.csv", "memory.csv", "report.md", "memory.png"} <= written


def test_full_runs_are_made_of_commands_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from benchmarks import __main__ as everything

    for gpu in (False, True):
        for module, *arguments in everything.steps(gpu, False, tmp_path):
            op = module.removeprefix("benchmarks.")
            if op in MODES:
                args = harness._parse(op, arguments)
                assert args.resume and args.output == tmp_path and math.isinf(args.limit)
            else:
                assert callable(importlib.import_module(module).main)
