"""Tables of measured times: their files, and the choices that dispatch makes by them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import resfuse
from resfuse.backends import dispatch, first_contact, measured
from resfuse.backends.triton.config import DTYPES, H100, KINDS, ConvProblem, ranked
from resfuse.cli import main
from resfuse.types import AbsentDevice, Convolution, Problem

H200 = AbsentDevice((9, 0), name="NVIDIA H200")
LAYER = ConvProblem("forward", torch.bfloat16, 128, 28, 28, 128, 128, 3, 3, padding=(1, 1))
CONFIG = ranked(LAYER, H100)[-1]
TIMES = {"sm90": 60.0, "triton": 70.0, "cuda": 41.2, "cudnn": 65.0, "reference": 90.0}
MEASURED = "measured on NVIDIA H200: cuda 41.2 us, sm90 60.0 us, cudnn 65.0 us, triton 70.0 us, reference 90.0 us"


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but those that a test writes."""
    monkeypatch.setenv("RESFUSE_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


def install(times: dict[str, float], *problems: ConvProblem, folder: Path | None = None, **left_out: str) -> Path:
    """Write a table to where it is looked for."""
    path = (folder or measured.user_folder()) / measured.file_name("NVIDIA H200")
    entry = measured.Entry(times, left_out, CONFIG)
    measured.write(path, "NVIDIA H200", dict.fromkeys(problems or (LAYER,), entry))
    dispatch.forget_choices()
    return path


def asked(problem: ConvProblem = LAYER, device: Any = H200, kernel: str = "conv_bn_act_forward") -> Problem:
    p = problem
    shapes = torch.Size((p.n, p.c, p.h, p.w)), torch.Size((p.k, p.group_in, p.r, p.s))
    convolution = Convolution(p.stride, p.padding, p.dilation, p.groups)
    form = p.kind == "train", p.residual, p.precision == "tf32"
    return Problem(kernel, device, p.dtype, *shapes, convolution, *form)


def choice(problem: Problem | None = None, request: str | None = None) -> dispatch.Choice:
    return dispatch.choose(problem or asked(), request)


# --- choices ---------------------------------------------------------------------------------------------------------


def test_the_fastest_backend_is_chosen_with_all_times_as_the_reason() -> None:
    predicted = choice()
    assert predicted.name == "sm90" and predicted.measured is None
    assert all("(predicted, not measured)" in reason for why in predicted.rejected.values() for reason in why)
    install(TIMES)
    assert choice()[:2] == ("cuda", dispatch.backend("cuda")) and choice().measured == MEASURED
    assert choice().rejected == {name: (MEASURED,) for name in TIMES if name != "cuda"}
    layers = torch.nn.Sequential(torch.nn.Conv2d(128, 128, 3, padding=1, bias=False), torch.nn.BatchNorm2d(128))
    explained = resfuse.explain(layers.bfloat16().eval(), (128, 128, 28, 28), device="h200")
    assert [(layer.backend, layer.reason) for layer in explained.layers] == [("cuda", MEASURED)]


@pytest.mark.parametrize("fastest", ["cudnn", "reference"])
def test_nothing_slower_than_pytorch_is_chosen(fastest: str) -> None:
    install({**TIMES, fastest: 40.0})
    assert choice()[:2] == (fastest, dispatch.backend(fastest))
    install({**TIMES, "sm90": 40.1, "reference": 40.0})
    assert choice().name == "reference", "noise or not"


def test_the_predicted_backend_stays_where_the_difference_may_be_noise() -> None:
    for time, name in ((41.2 * 1.019, "sm90"), (41.2 * 1.021, "cuda")):
        install({**TIMES, "sm90": time})
        assert choice().name == name


def test_a_backend_that_was_left_out_or_cannot_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: time for name, time in TIMES.items() if name != "sm90"}
    install({**others, "cuda": 99.0, "triton": 98.0, "cudnn": 97.0}, sm90="is wrong by 3.0e+00")
    assert choice().name == "reference", "rather than the predicted one"
    assert choice().rejected["sm90"] == ("when measured: is wrong by 3.0e+00",)
    install(TIMES)
    monkeypatch.setattr(dispatch.backend("cuda"), "unsupported_reasons", lambda problem: ["not today"])
    assert choice().name == "sm90" and choice().rejected["cuda"] == ("not today",)
    install({"cuda": 1.0})
    assert choice().name == "sm90" and choice().measured is None, "of those measured none can run"
    install(others)
    assert choice().name == "sm90" and choice().measured is None, "it could not run when the others were measured"


def test_in_training_pytorchs_convolution_is_that_of_cudnn() -> None:
    """Behind `reference` an activation that is computed again would not have the bits that it had."""
    trained = LAYER._replace(kind="train")
    install({**TIMES, "reference": 1.0, "cudnn": 2.0}, trained)
    assert choice(asked(trained)).name == "cudnn"


def test_a_backend_without_a_verdict_is_passed_over_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    install(TIMES)
    lookup, reasons, looked_up = measured.lookup, dispatch.reasons_against, []

    def unsettled(name: str, problem: Problem, automatic: bool) -> tuple[str, ...]:
        if looked_up and name == "cuda":
            raise first_contact.UnsettledError("a graph is being captured")
        return reasons(name, problem, automatic)

    def noting(problem: Problem) -> Any:
        looked_up.append(problem)
        return lookup(problem)

    monkeypatch.setattr(dispatch, "reasons_against", unsettled)
    monkeypatch.setattr(measured, "lookup", noting)
    assert choice().name == "sm90" and choice().measured is None
    dispatch.forget_choices()


def test_first_contact_comes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that seems to be there."""
    install(TIMES)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("resfuse.types._capability", lambda device: (9, 0))
    for name in ("cuda", "triton", "sm90"):
        monkeypatch.setattr(dispatch.backend(name), "unavailable_reason", lambda: None)
        monkeypatch.setattr(dispatch.backend(name), "unsupported_reasons", lambda problem: [])
    monkeypatch.setattr(first_contact, "objection", lambda name, problem: "is wrong" if name == "cuda" else None)
    found = choice(asked(device=torch.device("cuda", 0)))
    assert found.name == "sm90" and found.rejected["cuda"] == ("is wrong",)


def test_times_count_for_batches_up_to_twice_as_large_or_small() -> None:
    install(TIMES, LAYER)
    for n, name in ((128, "cuda"), (256, "cuda"), (257, "sm90"), (64, "cuda"), (63, "sm90")):
        assert choice(asked(LAYER._replace(n=n))).name == name, n
    assert "NVIDIA H200 at batch 128: cuda" in str(choice(asked(LAYER._replace(n=100))).measured)
    install(TIMES, LAYER._replace(n=96), LAYER)
    assert "at batch 96" in str(choice(asked(LAYER._replace(n=110))).measured), "the nearest"
    assert choice(asked(LAYER._replace(n=0))).measured is None


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "train"}, {"residual": True}, {"dtype": torch.float16}, {"k": 256}, {"h": 29}, {"stride": (2, 2)},
        {"r": 1, "s": 1, "padding": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_other_problems_are_predicted(changes: dict[str, Any]) -> None:
    install(TIMES)
    other = LAYER._replace(**changes)
    assert choice(asked(other)).measured is None
    install(TIMES, LAYER, other)
    assert choice(asked(other)).name == "cuda", "unless they are in the table"


def test_float32_is_told_apart_by_the_tf32_switch() -> None:
    tf32 = LAYER._replace(dtype=torch.float32, precision="tf32")
    install({"cuda": 10.0, "triton": 20.0, "sm90": 30.0}, tf32)
    assert choice(asked(tf32)).name == "cuda"
    assert choice(asked(tf32._replace(precision="ieee"))).name == "triton"


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_call_asks_for(compiled: bool) -> None:
    """Training and the residual, from which the table's problem is made."""
    x, w, vector = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 1, 1), torch.ones(4)
    dispatcher = FlopCounterMode(display=False) if compiled else contextlib.nullcontext()  # as compiled code calls
    with patch.object(dispatch, "choose", Mock(wraps=dispatch.choose)) as chosen, dispatcher, torch.no_grad():
        for training in (False, True):
            for residual in (None, torch.randn(2, 4, 6, 6)):
                resfuse.conv_bn_act(x, w, vector, vector.clone(), residual=residual, training=training)
                asked = [Problem(*call.args[0]) for call in chosen.call_args_list]
                assert asked[-1].kernel == "conv_bn_act_forward"
                assert asked[-1][-3:] == (training, residual is not None, False)


def test_requests_and_other_kernels_have_nothing_to_do_with_it() -> None:
    install(TIMES)
    assert choice(request="triton").name == "triton" and choice(request="triton").measured is None
    assert choice(asked(kernel="conv_forward")).name == "sm90"
    assert choice(asked(device=AbsentDevice((9, 0)))).name == "sm90", "a GPU without a name"
    assert choice(asked(device=H200._replace(name="NVIDIA H100"))).name == "sm90"


def test_tables_are_read_once() -> None:
    path = install(TIMES)
    assert choice().name == "cuda"
    path.unlink()
    assert choice(asked(LAYER._replace(n=127))).name == "cuda"
    dispatch.forget_choices()
    assert choice().name == "sm90"


def test_a_table_of_other_versions_ranks_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = install(TIMES)
    assert main(["info"]) == 0
    assert "1 problems: backends are chosen by it" in " ".join(capsys.readouterr().out.split())
    now = measured.versions()
    monkeypatch.setattr(measured, "versions", lambda: {**now, "torch": "3.0.0"})
    why = f"measured with torch {torch.__version__}, not 3.0.0: run `resfuse tune` again"
    assert choice().name == "sm90"
    assert choice(asked(LAYER._replace(n=1))).measured is None
    assert [record.getMessage() for record in caplog.records] == [f"{path} ranks no backends: {why}"]
    assert main(["info"]) == 0
    assert f"NVIDIA H200, 1 problems: {why}" in " ".join(capsys.readouterr().out.split())
    path.write_text("[]")
    assert main(["info"]) == 0
    assert "not used: " in capsys.readouterr().out


def test_the_users_table_comes_before_the_shipped_one() -> None:
    install({**TIMES, "sm90": 10.0}, LAYER, LAYER._replace(n=8), folder=measured.SHIPPED)
    assert choice().measured is not None and choice().name == "sm90"
    install(TIMES)
    assert choice().name == "cuda"
    assert choice(asked(LAYER._replace(n=8))).measured is not None, "of what the user's lacks"


# --- files -----------------------------------------------------------------------------------------------------------


def test_tables_are_for_one_device(caplog: pytest.LogCaptureFixture) -> None:
    install(TIMES).rename(measured.user_folder() / measured.file_name("NVIDIA H100"))
    assert choice(asked(device=H200._replace(name="NVIDIA H100"))).name == "sm90"
    assert "a table for NVIDIA H200, not for NVIDIA H100" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:-9]),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        lambda path: (path.unlink(), path.mkdir()),
        ('"version": 2', '"version": 1'),
        ('"measured_with": {', '"measured_with": 1, "others": {'),
        ('"entries": [', '"entries": {}, "others": ['),
        ('"entries": [', '"entries": [[], '),
        ("41.2", '"fast"'),
        ("41.2", "-41.2"),
        ("41.2", "NaN"),
        ('"cuda": 41.2', '"opencl": 41.2'),
        ('"left_out": {}', '"left_out": []'),
        ('"forward"', '"sideways"'),
        ('"bfloat16"', '"nn"'),
        ('"stride": [1, 1]', '"stride": [1]'),
        ('"stride": [1, 1]', '"stride": [0, 1]'),
        ('"groups": 1', '"groups": 3'),
        ('"h": 28', '"h": 0'),
        ('"n": 128', '"n": 1.5'),
        ('"n": 128', '"n": 128, "color": "red"'),
        ('"residual": false', '"residual": "no"'),
        ('"num_warps"', '"warps"'),
    ],
)
def test_malformed_tables_are_a_warning(
    damage: Callable[[Path], object] | tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = install(TIMES)
    if isinstance(damage, tuple):
        assert damage[0] in path.read_text()
        path.write_text(path.read_text().replace(*damage))
    else:
        damage(path)
    assert choice().name == "sm90"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{path} is not used: " in caplog.text
    choice(asked(LAYER._replace(n=1)))
    assert len(caplog.records) == 1, "one warning per file"


def test_where_tables_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert measured.user_folder() == tmp_path / "user"
    monkeypatch.delenv("RESFUSE_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert measured.user_folder() == tmp_path / "cache" / "resfuse" / "tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.user_folder() == tmp_path / ".cache" / "resfuse" / "tables"
    assert measured.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


def test_writing_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = install(TIMES)
    before = path.read_text()

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured.write(path, "NVIDIA H200", {})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path], "nothing is left behind"


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    entries = {
        LAYER._replace(kind=kind, dtype=dtype, residual=dtype == torch.float16): measured.Entry(TIMES, {}, config)
        for kind, config in zip(KINDS, (CONFIG, None), strict=True)
        for dtype in DTYPES
    }
    measured.write(tmp_path / "new" / "table.json", "NVIDIA H200", entries)
    assert measured.read(tmp_path / "new" / "table.json", "NVIDIA H200") == (measured.versions(), entries)
