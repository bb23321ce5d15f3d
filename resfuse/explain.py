"""`explain`: backend, cost and, where measured, lost time of each operator of a model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resfuse.backends import dispatch
from resfuse.explanation import PYTORCH, Explanation, Layer, Totals
from resfuse.fuse import fuse_
from resfuse.roofline import DEVICES, Device, Kernel, kernels, measure_device, named_arguments, processor_name
from resfuse.tracing import Call, Input, Run, Tracer, expanded, with_recomputation
from resfuse.types import AbsentDevice, Convolution, Problem

_FUSIBLE = ("convolution", "batch_norm", "relu", "add")
_SETS = 8  # of tensors that a measured operator takes in turn, at most
_SECONDS = 0.1  # for the measurement of an operator


def explain(
    model: nn.Module,
    *inputs: Input,
    device: str | Device | torch.device | None = None,
    backward: bool | None = None,
    measure: bool = False,
    backend: str | None = None,
    recompute: bool = False,
) -> Explanation:
    """List a model's operators with backend, launches, FLOPs, bytes and roofline time, fused and unfused.

    For every call of the fused model: shape, backend and why that one, kernel launches, floating-point operations,
    bytes, and the roofline time, which these take at least on a machine with given ceilings.  With `measure` also the
    time that the operator takes, and so where time is lost.  The model need not be fused: `explain` fuses a copy.  It
    is not changed, nothing is computed and no memory is taken, so a model on the meta device will do, for any batch.

    Args:
        model: in `train()` or `eval()`.
        inputs: tensors, or shapes; a shape stands for a tensor of the device and dtype of the model's parameters.
        device: the machine: one of `resfuse.roofline.DEVICES` by name, such as "h200", which need not be there; a
            `resfuse.roofline.Device`; or a device of torch, "cuda:0", whose ceilings are then measured, which takes a
            second, once.  None is the device that the model is on.
        backward: whether the gradients are in the figures; None: if the model is in training mode.
        measure: time each operator alone on random tensors on this machine's device (the median of several calls, on
            inputs that the caches do not hold).  `print` then begins with those that lose most.
        backend: as in `use_backend`, but for `explain` alone and so also for a machine that is not there; None: as
            `use_backend` or RESFUSE_BACKEND ask, else automatic choice.
        recompute: as `fuse_(recompute=True)`, whose passes over memory are then in backward's figures.  A model that
            was fused so needs no asking.

    Returns:
        The explanation: `print` it, or look at `layers`, `total`, `unfused` and `to_dict()`.

    Raises:
        TypeError: `model`, an input or `device` is of another type.
        ValueError: there is no such device, it cannot be measured on because it is not there, or the model cannot be
            traced; the message says why.
        RuntimeError: the requested backend cannot run an operator; the message says why.

    Source of the formulas: `resfuse.roofline`.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        >>> found = explain(layers.bfloat16().eval(), (8, 16, 56, 56), device="h200")
        >>> [(layer.path, layer.op, layer.backend, layer.bound) for layer in found.layers]
        [('0', 'conv_bn_act', 'sm90', 'memory')]
        >>> found.total.launches, found.unfused.launches > 2, found.total.flops == 2 * 8 * 32 * 56 * 56 * 16 * 9
        (1, True, True)
    """
    tracer = Tracer(model, inputs)
    described, place = _find(device, model)
    if measure and described.name != _name(place):
        raise ValueError(f"measure: {described.name} is not in this machine; only a device that is can be measured on")
    request = dispatch.requested_backend() if backend is None else dispatch.validated(backend)
    backward = model.training if backward is None else backward
    left: dict[str, str] = {}
    for name, reason in fuse_(tracer.model).left:
        if not reason.startswith("activation is") and not reason.endswith("already fused"):
            left[name] = reason
            left.setdefault(name.rpartition(".")[0], reason)  # also for the convolution before it
    machine = _Machine(described, place, request, left, measure)
    calls = tracer.calls(backward=backward)
    options = (getattr(type(module), "_resfuse_options", (True, False)) for module in model.modules())
    if backward and (recompute or any(again for _, again in options)):
        calls = with_recomputation(calls)
    fused = machine.layers(calls)
    unfused = machine.layers(tracer.calls(backward=backward, as_pytorch=True))
    shapes = tuple((tuple(input.shape), input.dtype) for input in tracer.inputs)
    return Explanation(
        fused, Totals.of(fused), Totals.of(unfused), described, tracer.name, shapes, model.training, backward
    )


@dataclasses.dataclass
class _Machine:
    """Makes layers of recorded operator calls: backend, cost, and measured time."""

    _device: Device
    _place: torch.device | AbsentDevice
    _request: str | None
    _left: dict[str, str]
    """Reasons of the modules that `fuse_` left alone."""
    _measures: bool
    _known: dict[Any, float] = dataclasses.field(default_factory=dict)
    """Measured seconds."""

    def layers(self, calls: Iterable[Call]) -> tuple[Layer, ...]:
        """The calls that move data."""
        return tuple(layer for call in calls if (layer := self._layer(call)) is not None)

    def _layer(self, call: Call) -> Layer | None:
        runs = (*call.forward, *call.backward)
        found = [kernel for run in runs for kernel in self._kernels(run)]
        if not found:
            return None
        limited = {"memory": 0.0, "compute": 0.0}
        for kernel in found:
            limited["compute" if kernel.is_compute_bound(self._device) else "memory"] += kernel.seconds(self._device)
        name, reason = self._choice(runs[0], call.path)
        gradients = [PYTORCH, *(self._choice(run)[0] for run in call.backward if run.func.namespace == "resfuse")]
        input, output = _main_tensor(runs[0].args, runs[0].output), _main_tensor(runs[0].output)
        return Layer(
            path=call.path,
            op=_op(runs[0]),
            detail=_detail(runs[0]),
            shape=tuple(input.shape),
            output_shape=tuple(output.shape),
            dtype=input.dtype,
            backend=name,
            backward_backend=gradients[-1] if call.backward else None,
            reason=reason,
            launches=len(found),
            flops=sum(kernel.flops for kernel in found),
            bytes=sum(kernel.bytes for kernel in found),
            seconds=sum(limited.values()),
            bound=max(limited, key=lambda bound: limited[bound]),
            measured=sum(map(self._seconds, runs)) if self._measures else None,
        )

    def _kernels(self, run: Run) -> list[Kernel]:
        backend = self._choice(run)[0] if run.func.namespace == "resfuse" else PYTORCH
        runs = expanded(run) if backend == "reference" else _in_two(run) if backend == "cudnn" else [run]
        return [kernel for run in runs for kernel in kernels(*run, self._device)]

    def _choice(self, run: Run, path: str = "") -> tuple[str, str]:
        """The backend, and why."""
        if run.func.namespace != "resfuse":
            around = [name for name in self._left if f"{path}.".startswith(f"{name}." if name else "")]
            if around and _op(run).endswith(_FUSIBLE):
                return PYTORCH, f"not fused: {self._left[max(around, key=len)]}"
            return PYTORCH, "PyTorch's own operator"
        choice = dispatch.choose(problem_of(run, self._place), self._request)
        if self._request is not None:
            return choice.name, "asked for by name"
        reasons = (f"not {other}: {', '.join(why)}" for other, why in choice.rejected.items())
        return choice.name, choice.measured or "; ".join(reasons) or "first in the order of preference"

    def _seconds(self, run: Run) -> float:
        """The median time of the operator, alone, on random tensors of such shapes and strides."""
        given = named_arguments(run.func, run.args, run.kwargs)
        key = (run.func, repr([(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in given.values()]))
        if key not in self._known:
            self._known[key] = 0.0
            if self._kernels(run):
                no_casts = torch.autocast(self._device.type, enabled=False)
                with dispatch.use_backend(self._request), torch.no_grad(), no_casts:
                    self._known[key] = self._timed(run.func, given)
        return self._known[key]

    def _timed(self, func: Any, given: dict[str, Any]) -> float:
        if self._device.type == "cuda":
            from triton.testing import do_bench  # clears the L2 cache between calls

            values = _random(given, self._place)
            return float(do_bench(lambda: func(**values), return_mode="median")) / 1e3
        from torch.utils.benchmark import Timer

        size = sum(value.nbytes for value in given.values() if isinstance(value, Tensor))
        count = min(_SETS, 2 + 2 * self._device.cache // max(size, 1))
        sets = [_random(given, self._place) for _ in range(count)]
        for values in sets:  # packs weights, chooses algorithms
            func(**values)
        names = {"func": func, "sets": itertools.cycle(sets)}
        timer = Timer("func(**next(sets))", globals=names, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=_SECONDS).median)


def problem_of(run: Run, place: torch.device | AbsentDevice) -> Problem:
    """The question that a registered operator asks of the dispatcher."""
    given = named_arguments(run.func, run.args, run.kwargs)
    kernel: str = run.func._overloadpacket.__name__
    if kernel.endswith(("_train", "_eval")):
        kernel = f"{kernel.rpartition('_')[0]}_forward"
    input: Tensor = given.get("input", run.args[0])
    if "conv_weight" not in given:
        return Problem(kernel, place, input.dtype, input.shape)
    stride, padding, dilation = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
    convolution = Convolution(stride, padding, dilation, given["groups"])
    training, residual = run.func._overloadpacket.__name__.endswith("_train"), given.get("residual") is not None
    tf32 = place.type == "cuda" and input.dtype == torch.float32 and dispatch.uses_tf32()
    shapes = input.shape, given["conv_weight"].shape
    return Problem(kernel, place, input.dtype, *shapes, convolution, training, residual, tf32)


def _in_two(run: Run) -> list[Run]:
    """A convolution with batch norm as the backend `cudnn` runs it."""
    ops, given = torch.ops.resfuse, named_arguments(run.func, run.args, run.kwargs)
    training = "momentum" in given
    output, z, *statistics = run.output if training else (run.output, run.output)
    norm = (ops.bn_act_train if training else ops.bn_act_eval).default

    def taken(func: Any, values: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(values[argument.name] for argument in func._schema.arguments)

    conv = ops.conv_forward.default
    return [
        Run(conv, taken(conv, given), {}, z),
        Run(norm, taken(norm, {**given, "input": z}), {}, (output, *statistics)),
    ]


def _op(run: Run) -> str:
    name: str = run.func._overloadpacket.__name__
    for suffix in ("_train", "_eval", "_forward", "_legit", "_with_indices", "_"):
        name = name.removesuffix(suffix)
    return name.removeprefix("_").removeprefix("native_")


def _detail(run: Run) -> str:
    """Kernel, stride, groups and residual."""
    given, words = named_arguments(run.func, run.args, run.kwargs), []
    weight: Any = given.get("conv_weight", given.get("weight"))
    kernel = given.get("kernel_size") or ("groups" in given and weight.shape[2:])
    if kernel:
        stride = given.get("stride") or kernel
        words.append("x".join(map(str, kernel)))
        if set(stride) != {1}:
            words[0] += f"/{stride[0]}" if len(set(stride)) == 1 else f"/{','.join(map(str, stride))}"
    if given.get("groups", 1) != 1:
        words.append(f"g{given['groups']}")
    if "bias" in given and given.get("residual") is not None:
        words.append("+res")
    output = _main_tensor(run.output)
    if not output.dtype.is_floating_point:  # such as a batch norm's num_batches_tracked
        words.append(str(output.dtype).removeprefix("torch."))
    return " ".join(words)


def _main_tensor(*values: Any) -> Tensor:
    """The activation among arguments or results: the first of the tensors with most dimensions."""
    return max((leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)), key=lambda tensor: tensor.dim())


def _random(value: Any, device: Any, name: str = "") -> Any:
    """Data in the shapes and strides of fake tensors; variances and the like are positive."""
    if isinstance(value, dict):
        return {name: _random(item, device, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_random(item, device, name) for item in value]
    if not isinstance(value, Tensor):
        return value
    sizes = [size if stride else 1 for size, stride in zip(value.shape, value.stride(), strict=True)]
    tensor = torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device=device)
    if not value.is_floating_point():
        return tensor.zero_().expand(value.shape)
    positive = "var" in name or "invstd" in name
    return (tensor.uniform_(0.5, 1.5) if positive else tensor.normal_()).expand(value.shape)


def _find(device: Any, model: nn.Module) -> tuple[Device, torch.device | AbsentDevice]:
    """The machine's description, and the device of torch, or its stand-in if it is not in this machine."""
    if device is None:
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        device = torch.device("cpu") if device.type == "meta" else device
    if isinstance(device, str):
        try:
            device = DEVICES.get(device.lower()) or torch.device(device)
        except RuntimeError:
            known = ", ".join(DEVICES)
            raise ValueError(f"device: expected one of {known}, or one of torch such as cpu, got {device!r}") from None
    if isinstance(device, torch.device):
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {device} is not in this machine ({torch.cuda.device_count()} GPUs)")
        return _measured(device), device
    if not isinstance(device, Device):
        found = type(device).__name__
        raise TypeError(f"device: expected a name, a resfuse.roofline.Device or a torch.device, got {found}")
    if device.type == "cpu":
        return device, torch.device("cpu")
    if device.capability is None:
        raise ValueError(f"device: {device.name} has no compute capability, which decides what can run on it")
    gpus = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    absent = AbsentDevice(device.capability, name=device.name)
    return device, next((gpu for gpu in gpus if _name(gpu) == device.name), absent)


def _name(place: torch.device | AbsentDevice) -> str | None:
    """The name of a device of this machine; None for one that is not there."""
    if isinstance(place, AbsentDevice):
        return None
    return torch.cuda.get_device_name(place) if place.type == "cuda" else processor_name()


_measured = functools.cache(measure_device)
