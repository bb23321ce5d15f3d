"""The pool that holds the large tensors of a training step on the CPU."""

from __future__ import annotations

import copy
import ctypes
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import resfuse
from resfuse.backends import cpu
from resfuse.ops.recompute import recomputing
from resfuse.types import BatchNorm, Convolution

ROOT = Path(__file__).parents[3]
LARGE = (2, 16, 32, 32)  # 128 KB in float32
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or cpu.unavailable_reason() is not None, reason="Linux alone"),
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 makes no tensors of memory that is freed later"),
]


def raw_output(seed: int = 0, shape: tuple[int, ...] = LARGE) -> Tensor:
    """z of a training call: its channels times one matrix."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    vectors = [torch.zeros(shape[1]), torch.ones(shape[1])] * 2
    bn = BatchNorm(vectors[0], vectors[1], vectors[3], vectors[2], True, 0.1, 1e-5)
    weight = torch.randn(shape[1], shape[1], 1, 1, generator=generator)
    z = cpu.conv_bn_act_forward(input, weight, None, Convolution(1, 0, 1, 1), bn, None, True)[1]
    assert z is not None
    return z


def is_pooled(tensor: Tensor) -> bool:
    return not tensor.untyped_storage().resizable()


def test_raw_output_is_of_the_pool() -> None:
    z = raw_output()
    assert is_pooled(z)
    assert z.data_ptr() % 4096 == 0
    assert z.untyped_storage().nbytes() == z.nbytes
    assert not is_pooled(raw_output(shape=(1, 4, 4, 4)))


def test_what_happens_to_tensors() -> None:
    z, expected = raw_output(), raw_output().clone()
    stream = io.BytesIO()
    torch.save(z, stream)
    stream.seek(0)
    for same in (copy.deepcopy(z), torch.load(stream), raw_output().share_memory_(), z.as_strided(z.shape, z.stride())):
        assert torch.equal(same, expected)
    version = z._version
    assert z.add_(1)._version == version + 1
    assert torch.equal(z, expected + 1)


def test_memory_is_used_again_whatever_the_sizes() -> None:
    """Two halves fit into the hole of one whole, and leave it again, also where another thread frees them."""
    ends: list[int] = []
    for _ in range(5):
        whole = raw_output(shape=(4, 16, 32, 32))
        ends.append(whole.data_ptr() + whole.nbytes)
        del whole
        halves = [raw_output(seed) for seed in range(2)]
        ends += [half.data_ptr() + half.nbytes for half in halves]
        thread = threading.Thread(target=halves.clear)
        thread.start()
        thread.join()
    assert max(ends) == max(ends[:3])


def test_tensors_do_not_overlap() -> None:
    kept = {seed: raw_output(seed, (1 + seed % 5, 16, 32, 32 + seed)) for seed in range(40)}
    for seed in range(0, 40, 3):
        del kept[seed]
    kept |= {seed: raw_output(seed, (1 + seed % 3, 16, 32, 40 + seed)) for seed in range(40, 60)}
    for seed, tensor in kept.items():
        expected = raw_output(seed, tuple(tensor.shape))
        assert torch.equal(tensor, expected), seed


def test_threads_share_it() -> None:
    expected = [raw_output(seed).clone() for seed in range(4)]
    failures: list[int] = []

    def work(seed: int) -> None:
        for _ in range(50):
            if not torch.equal(raw_output(seed), expected[seed]):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_results_can_be_resized() -> None:
    """In inference, and in training but for outputs that are computed again."""
    input, residual, vectors = torch.randn(LARGE), torch.randn(LARGE), [torch.zeros(16), torch.ones(16)]
    with torch.no_grad():
        found = [resfuse.bn_act(input, *vectors), resfuse.add_relu(input, residual)]
    model = resfuse.nn.ConvBNAct2d(16, 16, 1)
    found += [model(input), resfuse.bn_act(input.requires_grad_(), *vectors, training=True)]
    for output in found:
        output.detach().untyped_storage().resize_(0)
    with recomputing():
        assert is_pooled(model(input))


def test_without_addresses_memory_is_pytorchs() -> None:
    """As under `ulimit -v`."""
    code = """
import resource
from tests.backends.cpu.test_memory import is_pooled, raw_output
raw_output(shape=(1, 4, 4, 4))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
print(is_pooled(raw_output()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "False\n", result.stdout + result.stderr


STEP = """
import ctypes, torch, resfuse
from torch import nn

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
torch.set_num_threads(1)
def layer():
    return nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()

model = nn.Sequential(*(part for _ in range(12) for part in layer()))
resfuse.fuse_(model, recompute=True)
input = torch.randn(8, 16, 64, 64).to(memory_format=torch.channels_last)
for _ in range(3):
    output = model(input)
    holes = mallinfo()
    output.sum().backward()
del output
rollup = dict(line.split(":", 1) for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print((holes.fordblks - holes.keepcost) / input.nbytes, int(rollup["LazyFree"].split()[0]) * 1024 / input.nbytes)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts with glibc's mallinfo2")
def test_a_recomputing_step_leaves_no_holes() -> None:
    """After a forward of twelve layers glibc's heap holds few tensors' worth of free memory.

    After backward the system may take the pool's pages, at least those of the twelve z that it had.
    """
    result = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    holes, pages = map(float, result.stdout.split())
    assert holes <= 4 and pages >= 12, result.stdout
