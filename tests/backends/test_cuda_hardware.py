"""Properties of the cuda backend that only a GPU can show; elsewhere skipped, with the reason.

Its numbers are tested on a GPU by the tests of every backend.  Here: products on tensor cores, compute-sanitizer's four
tools, CUDA graphs, streams, devices, launches, synchronisation, determinism under load, tensors of over 2^31 elements.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse.backends import cuda_conv, dispatch, sm90, triton
from resfuse.nn import BNAct2d, ConvBNAct2d
from resfuse.types import BatchNorm
from resfuse.types import Convolution as Geometry
from tests import contract, shapes
from tests.contract import Call
from tests.emulator import cases
from tests.needs import ROOT
from tests.shapes import Convolution, add_relu_call, bn_act_call, conv_bn_act_call
from tools import cubin

pytestmark = pytest.mark.usefixtures("deterministic_cudnn")

DEVICE = "cuda"
UNAVAILABLE = dispatch.backend("cuda").unavailable_reason()
gpu = pytest.mark.skipif(UNAVAILABLE is not None, reason=UNAVAILABLE or "")
CALLS: dict[str, Callable[[torch.dtype, str], Call]] = {
    "add_relu": lambda dtype, device: add_relu_call((4, 64, 14, 14), dtype, device, layout="nhwc"),
    "bn_act-train": lambda dtype, device: bn_act_call((4, 64, 14, 14), dtype, device, layout="nhwc", training=True),
    "bn_act-eval": lambda dtype, device: bn_act_call((4, 64, 14, 14), dtype, device, layout="nhwc"),
    "conv_bn_act-train": lambda dtype, device: conv_bn_act_call(CONV, dtype, device, layout="nhwc", training=True),
    "conv_bn_act-eval": lambda dtype, device: conv_bn_act_call(CONV, dtype, device, layout="nhwc"),
}
CONV = Convolution((4, 64, 14, 14), 128, (3, 3), padding=(1, 1))
each_call = pytest.mark.parametrize("name", CALLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
cuda_and_emulator = pytest.mark.parametrize(
    ("backend", "device"),
    [pytest.param("cuda", "cuda", marks=gpu), pytest.param("cuda_emulator", "cpu")],
    ids=["cuda", "cuda_emulator"],
)


def step(call: Call, grad_output: Tensor) -> list[Tensor]:
    """Everything that a forward and backward compute; the call stays as it was."""
    return [*contract.results(contract.FUSED, call, grad_output).values()]


def grad_for(call: Call) -> Tensor:
    return torch.empty_like(contract.forward(contract.EAGER, call.map(torch.clone))).normal_()


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(left.cpu(), right.cpu()) for left, right in zip(found, expected, strict=True))


# --- tensor cores ----------------------------------------------------------------------------------------------------


@cuda_and_emulator
@pytest.mark.parametrize("tile", cuda_conv.TILES, ids=str)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32", "ieee"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_products_of_small_integers_are_exact(
    kernel: int, precision: str, tile: tuple[int, int], backend: str, device: str, convolutions: Any
) -> None:
    """A value in a wrong place changes the result: every element of every tile is compared in every bit."""
    if backend not in shapes.BACKENDS:
        pytest.skip("the emulator is not available")
    dtype = getattr(torch, precision, torch.float32)
    if dtype == torch.float32:
        convolutions.fp32_precision = precision
    generator = torch.Generator().manual_seed(kernel)
    x = torch.randint(-2, 3, (2, 72, 9, 8), generator=generator).to(dtype)
    w = torch.randint(-1, 2, (136, 72, kernel, kernel), generator=generator).to(dtype)
    expected = F.conv2d(x.double(), w.double(), padding=kernel // 2)
    assert expected.abs().max() <= 256, "integers that bfloat16 has"
    with cuda_conv.use_config(cuda_conv.ConvConfig(*tile)):
        found = dispatch.backend(backend).conv_forward(
            x.to(device), w.to(device), None, Geometry((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
        )
    assert torch.equal(found.cpu().double(), expected)


@pytest.mark.parametrize("tile", sm90.TILES)
@pytest.mark.parametrize("dtype", sm90.DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_products_on_hopper_are_exact(
    kernel: int, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles per block, ragged in pixels, channels and filters; in training the statistics of all of them."""
    reason = sm90.unavailable_reason()
    if reason is not None or torch.cuda.get_device_capability() != sm90.CAPABILITY:
        pytest.skip(reason or "not a Hopper GPU")
    torch.manual_seed(kernel)
    monkeypatch.setattr(sm90, "TILES", (tile,))
    for cached in ("planned", "_settings"):
        monkeypatch.setattr(sm90, cached, getattr(sm90, cached).__wrapped__)
    convolution = Geometry((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    x = torch.randint(-2, 3, (256, 72, 15, 17), device="cuda").to(dtype)
    w = torch.randint(-1, 2, (264, 72, kernel, kernel), device="cuda").to(dtype)
    z = F.conv2d(x.double(), w.double(), padding=kernel // 2)
    assert z.abs().max() <= 256, "integers that bfloat16 has"
    assert torch.equal(sm90.conv_forward(x, w, None, convolution).double(), z)
    bn = BatchNorm(None, None, None, None, True, 0.1, 1e-5)
    _, found, mean, invstd = sm90.conv_bn_act_forward(x, w, None, convolution, bn, None, True)
    assert found is not None and torch.equal(found.double(), z)
    variance, expected = torch.var_mean(z, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(invstd, (variance + 1e-5).rsqrt().float(), rtol=1e-5, atol=0)


@gpu
@pytest.mark.parametrize("kind", ["forward", "train"])
@pytest.mark.parametrize(
    ("side", "channels", "stride"),
    [(56, 64, 1), (28, 128, 1), (14, 256, 1), (7, 512, 1), (56, 128, 2), (14, 512, 2)],
)
def test_eight_warps_of_triton(side: int, channels: int, stride: int, kind: Any) -> None:
    """ResNet's 3x3 convolutions against cuDNN, in every bit: Triton has miscompiled such loops for 8 warps."""
    if (reason := triton.unavailable_reason()) is not None:
        pytest.skip(reason)
    from resfuse.backends.triton.plan import forced

    x = torch.randint(-2, 3, (32, channels, side, side), device=DEVICE)
    w = torch.randint(-20, 21, (channels, channels, 3, 3), device=DEVICE)
    x, w = (images.to(torch.bfloat16, memory_format=torch.channels_last) for images in (x, w * (w.abs() == 1)))
    expected = F.conv2d(x, w, None, stride, 1)
    assert expected.abs().max() <= 256, "integers that bfloat16 has"
    convolution = Geometry((stride, stride), (1, 1), (1, 1), 1)
    bn = BatchNorm(None, None, None, None, True, 0.1, 1e-5)
    for config in eight_warps(kind, x, convolution)[:2]:
        with forced(kind, config):
            if kind == "forward":
                found = triton.conv_forward(x, w, None, convolution)
            else:
                found = triton.conv_bn_act_forward(x, w, None, convolution, bn, None, True)[1]
        assert torch.equal(found, expected), config


def eight_warps(kind: Any, x: Tensor, convolution: Geometry) -> list[Any]:
    """The configurations of 8 warps for a 3x3 convolution that keeps its channels, the best first."""
    from resfuse.backends.triton import config, launch, plan

    n, c, h, w = x.shape
    problem = plan.tile_problem(config.ConvProblem(kind, x.dtype, n, h, w, c, c, 3, 3, *convolution, "ieee"))
    return [one for one in config.ranked(problem, launch.properties(x.device)) if one.num_warps == 8]


def test_there_are_configurations_of_eight_warps() -> None:
    pytest.importorskip("triton")
    from resfuse.backends.triton import config, launch

    x = torch.empty(32, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    for kind in ("forward", "train"):
        with launch.collected(config.H100):
            assert len(eight_warps(kind, x, Geometry((1, 1), (1, 1), (1, 1), 1))) >= 2


# --- compute-sanitizer -----------------------------------------------------------------------------------------------


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = cubin.tool("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in a toolkit")
    watched = [sys.executable, "-m", cases.__name__, "cuda"]
    command = [str(program), "--tool", tool, "--error-exitcode", "99", *watched]
    # An allocation of its own per tensor: what lies beyond one then belongs to nobody.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or tool == "racecheck", done.stdout[-8000:]


def test_the_program_for_compute_sanitizer_runs(convolutions: Any) -> None:
    if "cuda_emulator" not in shapes.BACKENDS:
        pytest.skip("the emulator is not available")
    assert cases.main(["cuda_emulator", "bfloat16"]) == 0


# --- graphs, streams, devices ----------------------------------------------------------------------------------------


@gpu
@each_dtype
@each_call
@pytest.mark.parametrize("training_step", [True, False], ids=["training_step", "forward"])
def test_cuda_graphs(training_step: bool, name: str, dtype: torch.dtype) -> None:
    """A captured call, replayed on new values, computes the bits that a direct one does."""
    static = CALLS[name](dtype, "cuda")
    grad_output = grad_for(static)
    initial = static.map(lambda tensor: tensor.detach().clone())

    def run(call: Call) -> list[Tensor]:
        if training_step:
            return step(call, grad_output)
        with torch.no_grad():
            return [contract.forward(contract.FUSED, call)]

    with resfuse.use_backend("cuda"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(static)
        for seed in (1, 2):
            fresh = initial.map(lambda tensor: tensor * (1 + seed))  # noqa: B023
            for tensor, value in zip(static.tensors.values(), fresh.tensors.values(), strict=True):
                if tensor is not None and value is not None:
                    tensor.detach().copy_(value)
            graph.replay()
            replayed = [tensor.clone() for tensor in captured]
            assert equal(replayed, run(fresh))


each_backend = pytest.mark.parametrize("backend", ["cuda", "triton", None], ids=["cuda", "triton", "automatic"])


@pytest.fixture
def requested(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs on one backend, or on those that are chosen for each layer, unseen: `sm90` among them on Hopper."""
    if backend is not None and (reason := dispatch.backend(backend).unavailable_reason()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("RESFUSE_FIRST_CONTACT", "skip")
    dispatch.forget_choices()
    torch._dynamo.reset()
    with resfuse.use_backend(backend):
        yield
    dispatch.forget_choices()


def network() -> torch.nn.Module:
    """Of convolutions that split their sums and others that do not, on images of 64 x 64."""
    torch.manual_seed(0)
    return resfuse.models.resnet18(num_classes=10).to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16, 3, 64, 64, generator=generator)
    return values.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)


@gpu
@each_backend
@pytest.mark.usefixtures("requested")
def test_a_captured_network(backend: str | None) -> None:
    """Replays compute what calls do, on new images, and after weights and statistics have been written in place."""
    model, static = network().eval(), images(0)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            output = model(static)
        for seed in (1, 2, 3):
            static.copy_(images(seed))
            graph.replay()
            assert equal([output], [model(static)])
            for tensor in (model.conv1.weight, model.layer1[0].bn1.running_mean, model.layer4[1].bn2.weight.data):
                tensor.mul_(1.25)
            before = output.clone()
            graph.replay()
            assert equal([output], [model(static)]) and not torch.equal(output, before)


def state(model: torch.nn.Module) -> list[Tensor]:
    """Parameters, their gradients, running statistics and counts of batches."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*grads, *model.state_dict().values()]


@gpu
@each_backend
@pytest.mark.usefixtures("requested")
def test_a_graphed_training_step(backend: str | None) -> None:
    """`make_graphed_callables` trains to the same bits: gradients, weights, running statistics, counts of batches."""
    graphed, plain = network(), network()
    initial = {name: value.clone() for name, value in plain.state_dict().items()}
    torch.cuda.make_graphed_callables(graphed, (images(0),))
    graphed.load_state_dict(initial)  # the statistics of the warm-up
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (graphed, plain)]
    targets = torch.arange(16, device=DEVICE) % 10
    for seed in range(1, 5):
        for model, optimizer in zip((graphed, plain), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images(seed)).float(), targets).backward()
            optimizer.step()
        assert equal(state(graphed), state(plain)), seed
    assert graphed.bn1.num_batches_tracked == 4
    assert not torch.equal(graphed.bn1.running_mean, initial["bn1.running_mean"])


@gpu
@each_backend
@pytest.mark.usefixtures("requested")
def test_reduce_overhead(backend: str | None) -> None:
    """`torch.compile`'s graphs, which reject tensors that stay in their memory pool, of kernels that meet in memory."""
    splits = torch.nn.Sequential(*(ConvBNAct2d(512, 512, 3, padding=1) for _ in range(2))).eval()
    barriers = torch.nn.Sequential(ConvBNAct2d(64, 64, 1), BNAct2d(64)).train()
    shapes = {splits: (1, 512, 7, 7), barriers: (4, 64, 14, 14), network().eval().float(): (2, 3, 64, 64)}
    with torch.no_grad():
        for module, shape in shapes.items():
            module.to(DEVICE, memory_format=torch.channels_last)
            compiled = torch.compile(module, mode="reduce-overhead")
            for seed in range(5):  # warm-up, recording, replays
                torch.manual_seed(seed)
                input = torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
                expected = module(input)
                torch.compiler.cudagraph_mark_step_begin()
                assert equal([compiled(input).clone()], [expected])


@gpu
@each_call
def test_side_streams(name: str) -> None:
    """Work is queued behind what the current stream, whichever that is, has queued before."""
    values, late = CALLS[name](torch.float32, "cuda"), CALLS[name](torch.float32, "cuda").map(torch.zeros_like)
    grad_output = grad_for(values)
    with resfuse.use_backend("cuda"):
        expected = step(values, grad_output)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # tens of milliseconds: whoever does not wait sees zeros
            for tensor, value in zip(late.tensors.values(), values.tensors.values(), strict=True):
                if tensor is not None and value is not None:
                    tensor.copy_(value)
            found = step(late, grad_output)
        stream.synchronize()
    assert equal(found, expected)


@gpu
@each_call
def test_another_device_than_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    call = CALLS[name](torch.float32, "cuda:0")
    grad_output = grad_for(call)
    with resfuse.use_backend("cuda"), torch.cuda.device(0):
        expected = step(call, grad_output)
        found = step(call.map(lambda tensor: tensor.to("cuda:1")), grad_output.to("cuda:1"))
    assert all(tensor.device.index == 1 for tensor in found)
    assert equal(found, expected)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@each_call
def test_nothing_synchronises(name: str) -> None:
    call = CALLS[name](torch.bfloat16, "cuda")
    grad_output = grad_for(call)
    with resfuse.use_backend("cuda"):
        step(call, grad_output)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(call, grad_output)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- launches -------------------------------------------------------------------------------------------------------


@gpu
@each_call
def test_one_launch_each_way(name: str) -> None:
    """Forward is one kernel, and so is what is fused of backward; the convolution's gradients are cuDNN's."""
    call = CALLS[name](torch.bfloat16, "cuda")
    grad_output = grad_for(call)
    with resfuse.use_backend("cuda"):
        step(call, grad_output)
        # Without acc_events the profiler warns that it forgets the events of the cycle before, which there is none of.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            step(call, grad_output)
            torch.cuda.synchronize()
    events = [event.key for event in profile.key_averages() for _ in range(event.count)]
    if not events:
        pytest.skip("the profiler records no kernels here")
    ours = [event for event in events if "resfuse" in event]
    # With running statistics and a batch norm whose weight needs a gradient, z is computed again.
    assert len(ours) == (3 if name == "conv_bn_act-eval" else 2), events


# --- determinism, size -----------------------------------------------------------------------------------------------


@gpu
@each_dtype
@each_call
def test_the_same_bits_while_the_gpu_is_busy(name: str, dtype: torch.dtype) -> None:
    """Blocks start in another order, and wait for each other for longer, when another stream takes its share."""
    call = CALLS[name](dtype, "cuda")
    grad_output = grad_for(call)
    other, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with resfuse.use_backend("cuda"):
        expected = step(call, grad_output)
        torch.cuda.synchronize()
        for _ in range(20):
            with torch.cuda.stream(other):
                load = torch.tanh(load @ load)
            found = step(call, grad_output)
            assert equal(found, expected)
        torch.cuda.synchronize()


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("op", ["bn_act", "conv_bn_act"])
def test_beyond_2_31_elements(op: str, training: bool) -> None:
    """The same image so often that offsets go beyond 32 bits: each result is that of one image, in float64.

    The output of conv_bn_act is that large; test_kernel_api has such an input.
    """
    count = 2**31 // (8 * 64 * 64) // (8 if op == "conv_bn_act" else 1) + 1
    needed, free = 6 * 2**31 * 2, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed >> 30} GiB of GPU memory are needed, {free >> 30} are free")
    pattern = torch.randn(1, 8, 64, 64, device="cuda", dtype=torch.bfloat16)
    x = pattern.expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    small = z = pattern.double().requires_grad_()
    w = torch.randn(64, 8, 1, 1, device="cuda", dtype=torch.bfloat16)
    if op == "conv_bn_act":
        z = F.conv2d(small, w.double())
    mean, var = torch.zeros(z.shape[1], device="cuda"), torch.ones(z.shape[1], device="cuda")
    expected = torch.relu(F.batch_norm(z, mean.double(), var.double(), training=training))
    with resfuse.use_backend("cuda"):
        if op == "conv_bn_act":
            output = resfuse.conv_bn_act(x, w, mean, var, training=training)
            results = [output]
        else:
            output = resfuse.bn_act(x.requires_grad_(), mean, var, training=training)
            (grad,) = torch.autograd.grad(output, x, output.detach())
            output = output.detach()
            results = [output, grad, resfuse.add_relu(x.detach(), output)]
            assert torch.equal(results[2][:1], torch.relu(pattern + output[:1]))
            (expected_grad,) = torch.autograd.grad(expected, small, output[:1].double())
            torch.testing.assert_close(grad[:1].double(), expected_grad, rtol=2**-6, atol=2e-2)
            if training:
                torch.testing.assert_close(mean.double(), 0.1 * z.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-6)
    assert output.numel() > 2**31
    for tensor in results:
        assert all(torch.equal(part, tensor[:1].expand_as(part)) for part in tensor.split(4096))
    torch.testing.assert_close(output[:1].double(), expected.detach(), rtol=2**-6, atol=4e-2)
