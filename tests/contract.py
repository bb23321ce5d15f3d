"""Numerics tests: one call of an operator, its eager equivalent, and the error rule that compares them.

The rule itself is `resfuse.contract`: E(fused) <= 1.5 E(eager) + floor, and the same for the worst element, for the
output, every gradient and every running statistic, where the truth is eager in float64 on the same rounded inputs.
Here stands what it is applied to, and three facts without which it would measure noise:

* Where the ReLU's argument is zero up to rounding, the mask is decided by rounding, and one flipped element changes a
  gradient by 100 %.  `grad_output` is zero there (`decided_by_rounding`), so the mask does not matter.
* Some results are zero but for cancellation: the gradient of a convolution's bias under batch statistics is exactly
  zero, that of the input nearly so with two values per channel.  Their relative error is noise divided by noise, so
  they are held to `floor` times the size of the terms that cancel (`term_sizes`).
* The error of eager, by which the fused one is judged, is one draw of rounding errors.  Of a result of n elements the
  norm of that draw is uncertain by 1 / sqrt(n) of what the roundings of its terms add up to: a single number can be
  right by luck.  So much, eps ||terms|| / sqrt(n), is added to the floor; for large results it is next to nothing.

And eager itself can be garbage: bfloat16 weight gradients on the CPU are uninitialised memory where the input is
narrower than the stride.  `eager_results` then takes the computation in float32, rounded to the dtype, in its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import resfuse
from resfuse import contract
from resfuse.types import BatchNorm, Convolution

RUNNING = ("running_mean", "running_var")
Results = dict[str, Tensor]
Functions = Mapping[str, Callable[..., Tensor]]

# float64 has no wider truth: eager is its own reference, with an error of 0 by definition.  What remains is that the
# formulas differ, a few roundings for sums of some thousand terms.
FLOOR_FLOAT64 = 1e-13

# ||result|| below this part of ||its terms|| counts as cancelled.  A result of n random terms keeps 1 / sqrt(n) of
# them, and no sum of random terms in the tests has more than 2500.
CANCELLED = 2e-2


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator: its name, its tensors and its options, all by the operator's own argument names."""

    op: str
    tensors: Mapping[str, Tensor | None]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        tensor = self.tensors["input"]
        assert tensor is not None
        return tensor

    @property
    def differentiable(self) -> list[str]:
        """Names of the tensors that can have a gradient."""
        return [name for name, tensor in self.tensors.items() if tensor is not None and name not in RUNNING]

    @property
    def convolution(self) -> Convolution:
        """The settings of its convolution, as the kernels take them."""
        default = Convolution((1, 1), (0, 0), (1, 1), 1)
        return Convolution(*(self.options.get(name, value) for name, value in default._asdict().items()))

    @property
    def batch_norm(self) -> BatchNorm:
        """Its batch norm, as the kernels take it."""
        tensors = (self.tensors.get(name) for name in (*RUNNING, "weight", "bias"))
        defaults = {"training": False, "momentum": 0.1, "eps": 1e-5}
        return BatchNorm(*tensors, *(self.options.get(name, value) for name, value in defaults.items()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with every tensor replaced."""
        tensors = {name: None if tensor is None else function(tensor) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def replace(self, **tensors: Tensor | None) -> Call:
        """The call with some tensors replaced."""
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: Any) -> Call:
        """The call with some options replaced."""
        return dataclasses.replace(self, options={**self.options, **options})

    def truth(self) -> Call:
        """The call in float64, on the values that the tensors have after rounding."""
        return self.map(lambda tensor: tensor.detach().to("cpu", torch.float64))


def eager_add_relu(input: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(input + residual)


def eager_bn_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pad_residual: bool = False,
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None and pad_residual:
        residual = _zero_padded(residual, output.shape[1])
    output = output if residual is None else output + residual
    return torch.relu(output) if activation == "relu" else output


def _zero_padded(residual: Tensor, channels: int) -> Tensor:
    return F.pad(residual, (0, 0, 0, 0, 0, channels - residual.shape[1]))


def eager_conv_bn_act(
    input: Tensor,
    conv_weight: Tensor,
    *,
    conv_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    **batch_norm: Any,
) -> Tensor:
    z = F.conv2d(input, conv_weight, conv_bias, stride, padding, dilation, groups)
    return eager_bn_act(z, **batch_norm)


FUSED: Functions = {
    "add_relu": resfuse.add_relu,
    "bn_act": resfuse.bn_act,
    "conv_bn_act": resfuse.conv_bn_act,
}
EAGER: Functions = {
    "add_relu": eager_add_relu,
    "bn_act": eager_bn_act,
    "conv_bn_act": eager_conv_bn_act,
}


def forward(functions: Functions, call: Call) -> Tensor:
    """The output of a call by `FUSED` or `EAGER`."""
    return functions[call.op](**call.tensors, **call.options)


def results(
    functions: Functions,
    call: Call,
    grad_output: Tensor,
    needs_grad: Collection[str] | None = None,
) -> Results:
    """Output, gradients and running statistics after one forward and backward.

    Args:
        functions: `FUSED` or `EAGER`.
        call: left as it was: the running statistics are updated in copies.
        grad_output: of the output's shape; moved to the output's device and dtype.
        needs_grad: names of the tensors whose gradients are wanted; None for all that can have one.
    """
    names = call.differentiable if needs_grad is None else [name for name in call.differentiable if name in needs_grad]
    leaves: dict[str, Tensor | None] = {}
    for name, tensor in call.tensors.items():
        if tensor is not None:  # detach() keeps strides and offset, which clone() would normalise
            tensor = tensor.clone() if name in RUNNING else tensor.detach().requires_grad_(name in names)
        leaves[name] = tensor
    output = functions[call.op](**leaves, **call.options)
    found: Results = {"output": output.detach()}
    if names:
        grads = torch.autograd.grad(output, [leaves[name] for name in names], grad_output.to(output))
        found |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    found |= {name: tensor for name in RUNNING if (tensor := leaves.get(name)) is not None}
    return found


def eager_results(call: Call, grad_output: Tensor, needs_grad: Collection[str] | None = None) -> Results:
    """`results` of eager; what is not finite there (see the module's docstring) is float32's, rounded once."""
    found = results(EAGER, call, grad_output, needs_grad)
    if not all(tensor.isfinite().all() for tensor in found.values()):
        wide = results(EAGER, call.map(Tensor.float), grad_output.float(), needs_grad)
        for name, tensor in found.items():
            if not tensor.isfinite().all():
                found[name] = wide[name].to(tensor.dtype)
    return found


@dataclasses.dataclass(frozen=True)
class _Anatomy:
    """Intermediate values of a call in float64, and the sizes of the terms each is a sum of."""

    z: Tensor
    z_terms: Tensor
    mean: Tensor
    invstd: Tensor
    preactivation: Tensor


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _squared_convolution(truth: Call) -> Tensor:
    """The sum of the squares of the convolution's terms: what independent roundings of the weights add up to."""
    weight = truth.tensors["conv_weight"]
    assert weight is not None
    return F.conv2d(truth.input.square(), weight.square(), None, *truth.convolution)


def _anatomy(truth: Call) -> _Anatomy:
    tensors, options = truth.tensors, truth.options
    z, z_terms = truth.input, truth.input.abs()
    if truth.op == "conv_bn_act":
        weight, bias = tensors["conv_weight"], tensors.get("conv_bias")
        assert weight is not None
        z = F.conv2d(truth.input, weight, bias, *truth.convolution)
        z_terms = F.conv2d(truth.input.abs(), weight.abs(), None if bias is None else bias.abs(), *truth.convolution)
    if options.get("training", False):
        mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    else:
        mean, variance = (tensors[name] for name in RUNNING)  # type: ignore[assignment]
    invstd = (variance + options.get("eps", 1e-5)).rsqrt()
    linear = truth.with_options(activation="identity")
    running = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items() if name in RUNNING}
    return _Anatomy(z, z_terms, mean, invstd, forward(EAGER, linear.replace(**running)))


def decided_by_rounding(call: Call, parts: _Anatomy | None = None) -> Tensor:
    """A mask of the elements whose ReLU argument lies within a few roundings of zero: rounding decides its sign."""
    truth = call.truth()
    eps = torch.finfo(call.input.dtype).eps
    residual = truth.tensors.get("residual")
    residual_size = torch.zeros(()) if residual is None else residual.abs()
    if truth.op == "add_relu":
        assert residual is not None
        return (truth.input + residual).abs() <= 4 * eps * (truth.input.abs() + residual_size)
    parts = parts or _anatomy(truth)
    if residual is not None:
        residual_size = _zero_padded(residual_size, parts.z.shape[1])
    weight = truth.tensors.get("weight")
    scale = parts.invstd.abs() if weight is None else (parts.invstd * weight).abs()
    # Rounded to the dtype: the convolution's output, batch norm's output, and their sum with the residual.  Computed
    # in float32 or wider, so smaller: the sum over the kernel, the mean, and the difference of z and the mean.
    rounded = parts.preactivation.abs() + residual_size
    if truth.op == "conv_bn_act":
        z_weight_rounded = _squared_convolution(truth).sqrt()
        rounded = rounded + (parts.z.abs() + z_weight_rounded) * _per_channel(scale)
    inside = (parts.z_terms + _per_channel(parts.mean.abs())) * _per_channel(scale)
    return parts.preactivation.abs() <= 4 * (eps * rounded + _statistics_eps(call) * inside)


def _statistics_eps(call: Call) -> float:
    """Precision of batch statistics: float32, but PyTorch rounds them to half precision where all tensors have it."""
    dtype = call.input.dtype
    vectors = (call.tensors.get(name) for name in (*RUNNING, "weight", "bias"))
    wide = any(vector is not None and vector.dtype == torch.float32 for vector in vectors)
    return torch.finfo(torch.float32 if wide else dtype).eps


def term_sizes(call: Call, grad_output: Tensor, parts: _Anatomy | None = None) -> Results:
    """For each result the sum of the sizes of its terms, in float64: the scale of errors where terms cancel."""
    truth, grad = call.truth(), grad_output.detach().to("cpu", torch.float64)
    tensors, options = truth.tensors, truth.options
    if truth.op == "add_relu":
        return {}
    parts = parts or _anatomy(truth)
    training, momentum = options.get("training", False), options.get("momentum", 0.1)
    weight, mean, invstd = tensors.get("weight"), _per_channel(parts.mean), _per_channel(parts.invstd)
    g = grad.abs()
    if options.get("activation", "relu") == "relu":
        g = g * (parts.preactivation > 0)
    xhat = ((parts.z - mean) * invstd).abs()
    grad_z = g
    if training:
        grad_z = g + g.mean((0, 2, 3), keepdim=True) + xhat * (g * xhat).mean((0, 2, 3), keepdim=True)
    grad_z = grad_z * invstd * (1 if weight is None else _per_channel(weight.abs()))
    sizes = {"grad_weight": (g * xhat).sum((0, 2, 3)), "grad_bias": g.sum((0, 2, 3)), "grad_input": grad_z}
    residual = tensors.get("residual")
    bias = tensors.get("bias")
    output = (parts.z_terms + mean.abs()) * invstd * (1 if weight is None else _per_channel(weight.abs()))
    if bias is not None:
        output = output + _per_channel(bias.abs())
    if residual is not None:
        output = output + _zero_padded(residual.abs(), output.shape[1])
    sizes["output"] = output
    if training:
        for name, new in zip(RUNNING, (parts.z.abs().mean((0, 2, 3)), parts.invstd.pow(-2)), strict=True):
            old = tensors.get(name)
            sizes[name] = momentum * new if old is None else momentum * new + (1 - momentum) * old.abs()
    if truth.op == "conv_bn_act":
        absolute = truth.map(Tensor.abs)
        leaves = {name: absolute.tensors[name] for name in ("input", "conv_weight", "conv_bias") if name in tensors}
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items() if tensor is not None}
        z = F.conv2d(leaves["input"], leaves["conv_weight"], leaves.get("conv_bias"), *truth.convolution)
        grads = torch.autograd.grad(z, list(leaves.values()), grad_z)
        sizes |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return sizes


def assert_within_contract(
    fused: Results,
    eager: Results | Sequence[Results],
    reference: Results,
    dtype: torch.dtype,
    terms: Results | None = None,
    *,
    floor: float | None = None,
) -> None:
    """Hold every fused result against the contract, and report all that break it.

    Args:
        fused, reference: the same quantities, computed and true (in float64).
        eager: eager's, or several of them where its accuracy depends on the memory format.
        dtype: what the fused and the eager computation ran in.
        terms: `term_sizes`, for quantities that may cancel.
        floor: the contract's floor, that of `dtype` if None.
    """
    eagers = [eager] if isinstance(eager, dict) else list(eager)
    assert fused.keys() == reference.keys()
    broken = []
    for name, tensor in fused.items():
        truth, size = reference[name], (terms or {}).get(name)
        assert tensor.dtype == eagers[0][name].dtype, f"{name}: {tensor.dtype}, but eager's is {eagers[0][name].dtype}"
        allowed = floor or (FLOOR_FLOAT64 if dtype == torch.float64 else contract.FLOORS[dtype])
        scale = None
        if size is not None and size.any():
            if truth.norm() < CANCELLED * size.norm():
                scale = size.norm().item()
            else:
                terms_per_result = (size.norm() / truth.norm()).item()
                allowed += torch.finfo(dtype).eps * terms_per_result / size.count_nonzero().item() ** 0.5
        measured = [found[name] for found in eagers]
        deviation = contract.measure(name, tensor, measured, truth, dtype, floor=allowed, scale=scale)
        if deviation.violated:
            broken.append(str(deviation))
    assert not broken, "\n".join(broken)


def random_grad_output(call: Call, generator: torch.Generator, parts: _Anatomy | None = None) -> Tensor:
    """A gradient in the dtype of the input and the layout of the output, zero where the mask is decided by rounding."""
    output = forward(EAGER, call.map(torch.clone))
    grad = torch.empty_like(output, dtype=torch.float32, device="cpu").normal_(generator=generator)
    if call.op == "add_relu" or call.options.get("activation", "relu") == "relu":
        grad = grad.masked_fill(decided_by_rounding(call, parts), 0)
    return grad.to(device=output.device, dtype=call.input.dtype)


class Oracle:
    """The true results of one call and eager's, computed once: every backend is held against them.

    Args:
        call: on any device; the oracle has it on the CPU.
        needs_grad: names of the tensors whose gradients are wanted; None for all that can have one.
    """

    def __init__(self, call: Call, needs_grad: Collection[str] | None = None, seed: int = 0) -> None:
        call = call.map(lambda tensor: to_device(tensor, "cpu"))
        self.call, self.needs_grad, self.dtype = call, needs_grad, call.input.dtype
        parts = None if call.op == "add_relu" else _anatomy(call.truth())
        self.grad_output = random_grad_output(call, torch.Generator().manual_seed(seed), parts)
        self.truth = results(EAGER, call.truth(), self.grad_output.double(), needs_grad)
        self.terms = term_sizes(call, self.grad_output, parts)
        self._eager: dict[str, list[Results]] = {}

    def eager(self, device: str) -> list[Results]:
        """Eager's results on a device: of a convolution in both memory formats, for the less accurate one counts."""
        if device not in self._eager:
            there = self.call.map(lambda tensor: to_device(tensor, device))
            calls = [there, there.map(_channels_last)] if self.call.op == "conv_bn_act" else [there]
            self._eager[device] = [eager_results(each, self.grad_output, self.needs_grad) for each in calls]
        return self._eager[device]

    def check(self, backend: str | None = None, device: str = "cpu") -> Results:
        """Hold a backend against the contract, forward and backward, and in inference, which may take another path.

        Returns:
            The backend's results.
        """
        floor = FLOOR_FLOAT64
        if self.dtype != torch.float64:
            floor = contract.floor_of(self.dtype, torch.device(device), convolution=self.call.op == "conv_bn_act")

        def hold(found: Results) -> None:
            truth = {name: self.truth[name] for name in found}
            assert_within_contract(found, self.eager(device), truth, self.dtype, self.terms, floor=floor)

        call = self.call.map(lambda tensor: to_device(tensor, device))
        with resfuse.use_backend(backend) if backend else contextlib.nullcontext():
            fused = results(FUSED, call, self.grad_output, self.needs_grad)
            assert fused.keys() == self.truth.keys()
            hold(fused)
            if not call.options.get("training", False):
                with torch.no_grad():
                    hold({"output": forward(FUSED, call)})
        return fused


def check(call: Call, needs_grad: Collection[str] | None = None) -> Results:
    """Hold one call against the contract, where its tensors are and on the backend in force; returns its results."""
    return Oracle(call, needs_grad).check(device=call.input.device.type)


def to_device(tensor: Tensor, device: str) -> Tensor:
    """The tensor itself, or a copy with the same strides and the same distance to an aligned address."""
    if tensor.device.type == torch.device(device).type:
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    room = torch.empty(tensor.storage_offset() + extent, dtype=tensor.dtype, device=device)
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
