"""What does not depend on the clock is what benchmarks/results/static.csv says: launches, saved bytes, registers.

A difference is a failure, also one for the better: then the table is stale.  `python -m benchmarks.static` shows all of
them, and `--write` takes over those that are meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks.static import __main__ as command
from benchmarks.static import groups, saved, table
from benchmarks.static.subjects import EAGER, FUSED, OPS, Op, Subject
from benchmarks.static.table import Difference, Row

TABLE = table.read()
LAUNCHES = [name for name in groups.GROUPS if name.startswith("launches")]


def row(value: int = 3, name: str = "bn_act", detail: str = "", toolchain: str = "") -> Row:
    return Row("a group", "op", name, "train", "forward", FUSED, value, detail, toolchain)


@pytest.mark.parametrize("name", groups.GROUPS)
def test_the_table_is_true(name: str, one_thread: None) -> None:
    known = [row for row in TABLE if row.group == name]
    assert known, f"the table has no such rows: {table.COMMAND}"
    reason = groups.reason_against(groups.GROUPS[name], known)
    if reason is not None:
        pytest.skip(reason)
    found = table.differences(known, groups.GROUPS[name].rows())
    listed = "\n".join(map(str, found))
    assert not found, f"{len(found)} rows of {table.TABLE.name} differ; if this is meant, {table.COMMAND}\n{listed}"


def test_the_table_has_no_other_groups() -> None:
    assert {row.group for row in TABLE} == set(groups.GROUPS)


def value(group: str, name: str, mode: str, phase: str, provider: str = FUSED) -> int:
    (found,) = [row for row in TABLE if row.key[0] == group and row.key[2:] == (name, mode, phase, provider)]
    return found.value


@pytest.mark.parametrize("group", LAUNCHES)
def test_one_launch_where_the_design_says_so(group: str) -> None:
    """conv_bn_act in inference and add_relu everywhere, bn_act on GPUs."""
    for name in ("conv_bn_act 1x1", "conv_bn_act 3x3", "conv_bn_act 1x1 + residual", "bn_act", "add_relu"):
        assert value(group, name, "inference", "forward") == 1
    assert value(group, "bn_act", "train", "forward") == 1
    assert value(group, "bn_act", "train", "backward") == (2 if group == "launches cpu" else 1)
    if group == "launches cuda":  # where no weight is cast by autocast
        assert value(group, "conv_bn_act 3x3", "train", "forward") == 1


@pytest.mark.parametrize("group", ["launches cpu", "saved bytes"])
def test_fused_is_never_more_than_eager(group: str) -> None:
    """But in backward, whose two kernels eager has as well; and where running statistics have gradients."""
    pairs: dict[tuple[str, ...], dict[str, int]] = {}
    for row in TABLE:
        if row.group == group and row.phase == "forward" and row.mode != "frozen":
            pairs.setdefault(row.key[:-1], {})[row.provider] = row.value
    assert len(pairs) >= 28
    assert all(sides[FUSED] <= sides[EAGER] for sides in pairs.values()), pairs


def test_what_is_predicted_is_what_is_launched() -> None:
    """Of ResNet-50's inference: the plan on paper and the kernels that the triton backend lists."""
    predicted = value("predicted for H200", "resnet50 launches", "inference", "forward")
    assert predicted == value("launches triton sm_90", "resnet50", "inference", "forward")
    for name in ("bytes", "launches"):
        for mode, phase in (("inference", "forward"), ("train", "step")):
            both = [value("predicted for H200", f"resnet50 {name}", mode, phase, side) for side in (FUSED, EAGER)]
            assert both[0] < both[1]


def test_saved_bytes_are_those_of_the_formula() -> None:
    """Input, z and output, mean and inverse standard deviation."""
    by_name = {subject.name: subject for subject in OPS}
    (call,) = by_name["conv_bn_act 1x1"].calls(FUSED, modes=("train",))
    assert saved.saved(call) == 4 * (2 * 16 * 8 * 8 + 2 * 2 * 32 * 8 * 8 + 2 * 32)


def test_fused_and_eager_operators_are_the_same() -> None:
    """So that what is compared is the same work."""
    for subject in OPS:
        calls = [next(iter(subject.calls(provider, modes=("train",)))) for provider in (EAGER, FUSED)]
        outputs = [call.phases()["forward"]() for call in calls]
        torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("before", "now", "kind", "message"),
    [
        (row(3), row(4), "worse", "worse: a group, op, bn_act, train, forward, resfuse: before 3, now 4"),
        (row(3), row(2, detail="x"), "better", "before 3, now 2 (x)"),
        (row(3, detail="a b"), row(3, detail="a c"), "changed", "before 3 (a b), now 3 (a c)"),
        (None, row(3), "new", "before -, now 3"),
        (row(3), None, "gone", "before 3, now -"),
    ],
)
def test_differences(before: Row | None, now: Row | None, kind: str, message: str) -> None:
    same = row(7, name="add_relu")
    (found,) = table.differences([same, *([before] if before else [])], [same, *([now] if now else [])])
    assert found == Difference(before, now)
    assert found.kind == kind
    assert message in str(found)


def test_a_quantity_is_there_once() -> None:
    with pytest.raises(ValueError, match="two rows are a group, op, bn_act"):
        table.differences([], [row(1), row(2)])


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [row(1, detail="2 aten::add, aten::mm", toolchain="torch 2.11"), row(2, name="with, comma")]
    table.write(rows, tmp_path / "table.csv")
    assert table.read(tmp_path / "table.csv") == rows
    assert table.read(tmp_path / "none.csv") == []
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv: expected the columns group, level, .* got \['a', 'b'\]"):
        table.read(tmp_path / "other.csv")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Groups in place of the real ones."""

    def replace(*rows: Row, reason: str | None = None, toolchain: str = "") -> None:
        group = groups.Group("a group", lambda name, toolchain: list(rows), lambda: reason, lambda: toolchain)
        monkeypatch.setattr(groups, "GROUPS", {"a group": group})

    return replace


def test_the_command(only: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"

    def run(*arguments: str) -> tuple[int, str]:
        code = command.main(["--table", str(path), *arguments])
        return code, capsys.readouterr().out

    only(row(3))
    assert run()[0] == 1  # no table is no match
    assert run("--write")[0] == 0
    assert run() == (0, "a group: 1 rows, 0 differ\n")
    only(row(4))
    code, output = run()
    assert code == 1
    assert "worse: a group, op, bn_act, train, forward, resfuse: before 3, now 4" in output
    assert f"If this is meant: {table.COMMAND}" in output
    assert table.read(path) == [row(3)]
    only(row(5), reason="no compiler is here")
    assert run("--write")[0] == 0
    assert table.read(path) == [row(3)]  # what can not be counted here is kept


def test_another_toolchain_is_not_compared(only: Callable[..., None]) -> None:
    only(row(3, toolchain="torch 2.15"), toolchain="torch 2.15")
    known = [row(3, toolchain="torch 2.11")]
    group = groups.GROUPS["a group"]
    assert groups.reason_against(group, known) == "the table has torch 2.11, here is torch 2.15"
    assert groups.reason_against(group, known, comparing=False) is None
    assert groups.reason_against(group, [dataclasses.replace(known[0], toolchain="torch 2.15")]) is None


def test_an_operator_that_is_not_fused_is_noticed() -> None:
    """The whole way: one more launch in an operator is a row that is worse."""
    from benchmarks.static import launches

    class Slower(Op):
        def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(input, residual) + 0

    def count(module: type[Op]) -> list[Row]:
        subject = Subject("op", "bn_act", (2, 16, 8, 8), lambda: module("bn_act", 16))
        return launches.of_subjects([subject], "a group", "")

    found = table.differences(count(Op), count(Slower))
    assert {(difference.kind, difference.now.value - difference.before.value) for difference in found} == {("worse", 1)}  # type: ignore[union-attr]
    assert {difference.now.phase for difference in found} == {"forward"}  # type: ignore[union-attr]
