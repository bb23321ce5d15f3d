"""Memory of training steps: what is counted, what is predicted from it, the search for a batch; the page's tables."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchvision")

from benchmarks import pages, records
from benchmarks.memory import __main__ as command
from benchmarks.memory import command_line, counting, measured, networks, page, plans
from benchmarks.memory.account import COMPILED, EAGER, FUSED, PROVIDER_NAMES, Account, Line, _lines, account
from benchmarks.memory.networks import BLOCKS, Network, residual_block
from benchmarks.providers.base import Setting

CPU = torch.device("cpu")
# Importing Inductor's decompositions warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@functools.cache
def counted(name: str, provider: str, dtype: torch.dtype = torch.float32) -> Account:
    """Once for all tests of this file."""
    blocks = {block.name: block for block in (*BLOCKS, SMALL)}
    return account(blocks.get(name) or networks.model(name), provider, dtype)


SMALL = residual_block("BasicBlock", 8, 8, 6)


# Counting


def test_saved_bytes_by_hand() -> None:
    input, weight = torch.randn(5, 7, requires_grad=True), nn.Parameter(torch.randn(3, 7))

    def step() -> None:
        F.linear(input, weight).exp().sum().backward()

    # The input, and the result of exp; the weight is own.
    assert counting.saved_bytes(step, [weight]) == 4 * (5 * 7 + 5 * 3)
    assert counting.saved_bytes(step, []) == 4 * (5 * 7 + 5 * 3 + 3 * 7)
    assert counting.saved_bytes(step, [weight, input]) == 4 * 5 * 3


def test_views_of_one_storage_count_once() -> None:
    input = torch.randn(4, 6, requires_grad=True)

    def step() -> None:
        output = input.sin()
        (output[:2].exp() * output[2:].exp()).sum().backward()

    # sin keeps its input; each exp its output, and the product the same two.
    assert counting.saved_bytes(step, []) == 4 * (24 + 12 + 12)


def test_live_bytes_by_hand() -> None:
    state: list[Tensor] = []
    input = torch.randn(MEGABYTE // 4)

    def step() -> None:
        if not state:
            state.append(torch.zeros(MEGABYTE // 4))
        double = input * 2
        triple = double + input
        del double
        state[0].add_(triple)

    timeline = counting.live_bytes(step, [input])
    assert [name.partition(".")[0] for name, _ in timeline] == ["aten::mul", "aten::add", "aten::add_"]
    # Input and state; the product, the sum; the product is gone.
    assert [alive / MEGABYTE for _, alive in timeline] == [3, 4, 3]


def test_saved_bytes_of_a_block_by_hand() -> None:
    # Input, z and output of two convolutions, where the first one's output is the second one's input; mean and invstd.
    found = counted(SMALL.name, FUSED).saved
    assert found == Line(4 * 2 * 2 * 8, 4 * 8 * 6 * 6 * 5)


# Accounts


@pytest.mark.parametrize("provider", [EAGER, FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prediction_is_what_another_batch_needs(provider: str, dtype: torch.dtype) -> None:
    network = networks.model("cifar_resnet8")
    setting = Setting("train", dtype, CPU, 1)
    assert measured.peak_bytes(network, provider, 7, setting) == counted(network.name, provider, dtype).peak(7)


def test_segments_are_the_most_between_batch_norms() -> None:
    small = [
        ("conv", 10),
        ("aten::native_batch_norm", 30),
        ("relu", 20),
        ("aten::convolution_backward", 50),
        ("add_", 9),
    ]
    large = [("other conv", 10), ("zeros", 50), ("aten::native_batch_norm", 40)]
    large += [("relu", 40), ("aten::convolution_backward", 90), ("add_", 9), ("add_", 9)]
    # Up to the batch norm 30 and 50, up to the last convolution 50 and 90, and the update.
    assert _lines(small, large) == (Line(10, 10), Line(10, 20), Line(9, 0))
    with pytest.raises(RuntimeError, match="different batch norms"):
        _lines(small, large[3:])


def test_state_of_a_model() -> None:
    model = networks.model("cifar_resnet8")
    found = counted(model.name, EAGER)
    assert found.parameters == sum(parameter.nbytes for parameter in model.make().parameters())
    # In the update parameters, momentum and gradients exist, and nothing is kept.
    assert found.peak(0) >= 3 * found.parameters + found.buffers
    assert found.input == Line(0, 4 * 3 * 32 * 32 + 8)


@pytest.mark.parametrize("block", BLOCKS[:-1], ids=lambda block: block.name)  # the last has 4 million weights
def test_a_fused_block_keeps_what_an_eager_one_keeps(block: Network) -> None:
    block = dataclasses.replace(block, extent=8)
    assert account(block, FUSED, torch.bfloat16).saved == account(block, EAGER, torch.bfloat16).saved


@pytest.mark.slow
def test_torch_compile_keeps_no_more_than_eager() -> None:
    network = networks.model("cifar_resnet20")
    eager, compiled = (account(network, provider, page.DTYPE) for provider in (EAGER, COMPILED))
    assert 0.9 * eager.saved.per_image < compiled.saved.per_image < eager.saved.per_image
    assert compiled.peak(64) < eager.peak(64)
    assert page.kept_row(network.name, compiled.saved) in rows_of(pages.tables_of(page.PAGE)["kept"])


def test_compiled_block_really_is_compiled() -> None:
    """Of the last ReLU it keeps a mask of bytes, where eager keeps the output."""
    eager, compiled = (counted(SMALL.name, provider).saved.per_image for provider in (EAGER, COMPILED))
    assert eager - compiled == 3 * 8 * 6 * 6


def test_largest_batch_inverts_the_peak() -> None:
    found = counted("cifar_resnet8", FUSED)
    for batch in (1, 2, 17, 1000):
        peak = found.peak(batch)
        assert found.largest_batch(peak) == batch
        assert found.largest_batch(peak - 1) == batch - 1
    assert found.largest_batch(found.parameters) == 0


def test_an_unknown_provider_is_named() -> None:
    with pytest.raises(ValueError, match=r"provider: expected one of eager_channels_last.* got 'tensorrt'"):
        account(SMALL, "tensorrt", torch.float32)


# Plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cifar_resnet8", "Bottleneck 64-256 + projection"])
def test_shapes_alone_give_what_is_counted(name: str, dtype: torch.dtype) -> None:
    network = {block.name: block for block in BLOCKS}.get(name) or networks.model(name)
    if network.level == "block":
        network = dataclasses.replace(network, extent=8)
        assert account(network, FUSED, dtype).saved.per_image == plans.now(plans.kept_tensors(network, dtype))
    else:
        for provider in (EAGER, FUSED):
            assert counted(name, provider, dtype).saved.per_image == plans.now(plans.kept_tensors(network, dtype))


def test_shapes_alone_give_what_is_counted_with_a_pooling() -> None:
    network = networks.model("resnet18", 32)
    found = account(network, FUSED, torch.float32)
    assert found.saved.per_image == plans.now(plans.kept_tensors(network, torch.float32))


def test_plans_of_a_block_by_hand() -> None:
    elements = 8 * 6 * 6  # of the input, of z1, y1, z2 and the output
    kept = plans.kept_tensors(SMALL, torch.bfloat16)
    assert [tensor.role for tensor in kept] == ["input", "z", "y", "z", "block"]
    assert plans.now(kept) == plans.byte_positions(kept) == 2 * 5 * elements
    assert plans.prologues(kept) == 2 * 4 * elements
    assert plans.raw_outputs(kept) == 2 * 3 * elements + elements // 8
    assert plans.recomputed(kept) == 2 * elements


def test_positions_by_hand() -> None:
    kept = plans.kept_tensors(networks.model("resnet18"), torch.bfloat16)
    assert plans.now(kept) - plans.byte_positions(kept) == 7 * 64 * 56 * 56


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20"])
def test_each_plan_keeps_no_more_than_the_one_before(name: str) -> None:
    kept = plans.kept_tensors(networks.model(name), torch.bfloat16)
    counts = [plan(kept) for plan in plans.PLANS.values()]
    assert counts == sorted(counts, reverse=True)
    assert 0.5 < counts[-1] / counts[0] < 0.6  # and no plan does without the raw outputs
    assert counts[-1] > sum(tensor.bytes for tensor in kept if tensor.role == "z")


# Measuring, as far as a CPU can


@pytest.mark.parametrize("predicted", [0, 1, 5, 40, 100])
@pytest.mark.parametrize("largest", [0, 1, 6, 40, 41, 99])
def test_search(predicted: int, largest: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= largest

    found = measured.search(predicted, fits)
    assert found == (largest, largest + 1) and found.exact
    assert len(set(tried)) == len(tried) and min(tried) >= 1
    if predicted == largest > 0:
        assert tried == [predicted, predicted + 1]


def test_search_ends() -> None:
    assert measured.search(10, lambda batch: True, tries=3) == (13, None)
    assert measured.search(100, lambda batch: False, tries=2) == (0, 99)
    assert not measured.search(100, lambda batch: False, tries=2).exact


def test_out_of_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise torch.OutOfMemoryError("no memory")

    setting = Setting("train", torch.float32, CPU, 1, level="block")
    assert measured.fits(SMALL, EAGER, MEGABYTE, setting, 2)
    assert not measured.fits(SMALL, EAGER, 1000, setting, 2)
    monkeypatch.setattr(measured, "peak_bytes", fails)
    assert not measured.fits(SMALL, EAGER, MEGABYTE, setting, 2)


def test_a_compiled_step_can_not_be_followed_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="on a GPU only"):
        measured.peak_bytes(SMALL, COMPILED, 2, Setting("train", torch.float32, CPU, 1, level="block"))


class FakeAllocator:
    """What is called of torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[object] = []
        answers = {"max_memory_allocated": 1234, "get_device_properties": SimpleNamespace(total_memory=1000)}
        for name in (*answers, "synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, functools.partial(self.call, name, answers.get(name)))
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: self.calls.append(fraction)
        )

    def call(self, name: str, answer: object, *_: object) -> object:
        self.calls.append(name)
        return answer


def test_cuda_calls_of_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    assert measured._allocated(lambda: allocator.calls.append("step"), torch.device("cuda")) == 1234
    before = ["step"] * measured.WARM_UP
    after = ["synchronize", "reset_peak_memory_stats", "step", "synchronize", "max_memory_allocated"]
    assert allocator.calls == before + after


def test_cuda_calls_of_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, cuda = FakeAllocator(monkeypatch), torch.device("cuda")
    with pytest.raises(torch.OutOfMemoryError), measured._limited(250, cuda), measured._clean(cuda):
        raise torch.OutOfMemoryError("no memory")
    assert allocator.calls == ["get_device_properties", 0.25, "empty_cache", "empty_cache", 1.0]
    with measured._limited(5000, cuda):
        assert allocator.calls[-1] == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("provider", [EAGER, FUSED])
def test_a_gpu_needs_what_is_predicted_and_workspace(provider: str) -> None:
    network = networks.model("resnet18")
    predicted = counted(network.name, provider, torch.bfloat16).peak(32)
    found = measured.peak_bytes(network, provider, 32, Setting("train", torch.bfloat16, torch.device("cuda"), 1))
    assert 0.95 * predicted < found < 1.5 * predicted + (256 << 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_limited_and_freed_again() -> None:
    network, cuda = networks.model("cifar_resnet8"), torch.device("cuda")
    setting = Setting("train", torch.float32, cuda, 1)
    assert not measured.fits(network, EAGER, 64 << 20, setting, 4096)
    assert measured.fits(network, EAGER, 4 << 30, setting, 16)


# The command and the page


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_commit", lambda: "abc")  # the same all the time
    arguments = ["--model", "cifar_resnet8", "--level", "model", "--device", "cpu", "--output", str(tmp_path)]
    arguments += ["--dtype", "float32", "--provider", EAGER, FUSED, "--batch", "2", "5"]
    assert command.main([*arguments, "--measure", "--fit", "10MB"]) == 0
    output = capsys.readouterr().out
    assert output.count("fits and the next does not") == 2
    beyond = [line.split() for line in output.splitlines() if "beyond prediction" in line]
    assert [line[2:] for line in beyond] == [["0", "0"]] * 2  # on a CPU there is no workspace to be seen
    rows = records.read(tmp_path / "memory.csv")
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        values.setdefault((row.name, row.provider, row.shape), {})[row.metric] = row.p50
    for provider, batch in itertools.product((EAGER, FUSED), (2, 5)):
        found = values["cifar_resnet8", provider, f"{batch}x3x32x32"]
        assert found["peak_memory"] == found["predicted_peak"] > found["saved_bytes"] > 0
    found = values["cifar_resnet8 in 0.00931 GiB", FUSED, "1x3x32x32"]
    assert found["predicted_batch"] == found["largest_batch"] > 0
    assert command.main([*arguments, "--resume"]) == 0
    assert "training step" not in capsys.readouterr().out


def test_a_failure_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise torch.OutOfMemoryError("tried to allocate\nand more")

    monkeypatch.setattr(measured, "peak_bytes", fails)
    arguments = ["--model", "cifar_resnet8", "--level", "model", "--device", "cpu", "--output", str(tmp_path)]
    arguments += ["--dtype", "float32", "--provider", EAGER, "--batch", "2", "--measure", "--fit", "10MB"]
    assert command.main(arguments) == 0
    output = capsys.readouterr().out
    assert "cifar_resnet8, eager_channels_last, batch 2: OutOfMemoryError: tried to allocate\n" in output
    assert "0 fits and the next does not" in output
    assert "peak_memory" not in {row.metric for row in records.read(tmp_path / "memory.csv")}


def test_command_ends_before_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "cifar_resnet8", "--device", "cpu", "--output", str(tmp_path), "--limit", "-1"]
    assert command.main(arguments) == 0
    assert "Left for the next run (--resume), as --limit is near: cifar_resnet8 bfloat16" in capsys.readouterr().out
    assert not (tmp_path / "memory.csv").exists()


def test_command_names_a_network_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cifar_resnet21"):
        command.main(["--model", "cifar_resnet21", "--device", "cpu", "--output", str(tmp_path)])


def test_blocks_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "BLOCKS", (SMALL,))
    arguments = ["--level", "block", "--device", "cpu", "--output", str(tmp_path), "--dtype", "float32"]
    assert command.main([*arguments, "--block-batch", "3"]) == 0
    rows = records.read(tmp_path / "memory.csv")
    assert {row.provider for row in rows} == set(PROVIDER_NAMES)
    assert {(row.level, row.metric, row.shape) for row in rows} == {("block", "saved_bytes", "3x8x6x6")}


@pytest.mark.parametrize(("text", "size"), [("16GiB", 16 << 30), ("80 GB", 80 * 10**9), ("0.5MiB", 1 << 19), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert command_line.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "16 gib", "-1GB", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a size: expected a number"):
        command_line.parse_size(text)


def rows_of(table: str) -> list[tuple[str, ...]]:
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[2:]]


def test_tables_of_the_page_from_shapes() -> None:
    """`python -m benchmarks.memory.page` writes them anew."""
    found = pages.tables_of(page.PAGE)
    assert found["plans"] == page.plans_table()
    assert found["shares"] == page.shares_table()
    rows = rows_of(found["kept"])
    assert tuple(row[0] for row in rows) == networks.NAMES
    for name, eager, _, fused, *_ in rows:
        kept = plans.now(plans.kept_tensors(networks.model(name), page.DTYPE))
        assert eager == fused == page.megabytes(kept)


@pytest.mark.slow
def test_peaks_of_the_page() -> None:
    assert set(page.peak_rows([FUSED])) <= set(rows_of(pages.tables_of(page.PAGE)["peaks"]))
