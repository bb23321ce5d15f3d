"""`explain`: per layer of a model, where it runs, what it costs at least, and how far from that it is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resfuse.backends import dispatch
from resfuse.explanation import PYTORCH, Explanation, Layer, Totals
from resfuse.surgery import FuseReport, fuse_
from resfuse.types import AbsentDevice, Convolution, Problem

if TYPE_CHECKING:  # roofline and tracing take a third of a second to import, which only `explain` itself needs
    from resfuse.roofline import Cost, Device
    from resfuse.tracing import Call, Input, Run

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
) -> Explanation:
    """Where each operator of a model runs and what it costs, per call and in total, fused and unfused.

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
        [('0', 'conv_bn_act', 'triton', 'memory')]
        >>> found.total.launches, found.unfused.launches > 2, found.total.flops == 2 * 8 * 32 * 56 * 56 * 16 * 9
        (1, True, True)
    """
    from resfuse.tracing import Tracer

    tracer = Tracer(model, inputs)
    described, place = _find(device, model)
    if measure and (isinstance(place, AbsentDevice) or not _is_here(described)):
        raise ValueError(f"measure: {described.name} is not in this machine; only a device that is can be measured on")
    request = dispatch.requested_backend() if backend is None else dispatch.validated(backend)
    backward = model.training if backward is None else backward
    report = fuse_(tracer.model)
    pricing = _Pricing(described, place, request, measure, report)
    fused = pricing.layers(tracer.calls(backward=backward), backward)
    unfused = pricing.layers(tracer.calls(backward=backward, as_pytorch=True), backward)
    shapes = tuple((tuple(input.shape), input.dtype) for input in tracer.inputs)
    return Explanation(
        fused, Totals.of(fused), Totals.of(unfused), described, tracer.name, shapes, model.training, backward
    )


class _Pricing:
    """From recorded operator calls to layers, on one machine."""

    def __init__(
        self,
        device: Device,
        place: torch.device | AbsentDevice,
        request: str | None,
        measure: bool,
        report: FuseReport,
    ) -> None:
        self._device, self._place, self._request, self._measure = device, place, request, measure
        self._left = {left.name: left.reason for left in report.left if left.reason != "already fused"}
        self._known: dict[Any, float] = {}  # measured seconds

    def layers(self, calls: Sequence[Call], backward: bool) -> tuple[Layer, ...]:
        """The calls that move data."""
        found = (self._layer(call, backward) for call in calls)
        return tuple(layer for layer in found if layer is not None)

    def _layer(self, call: Call, backward: bool) -> Layer | None:
        from resfuse.roofline import FREE, roofline

        times = {"memory": 0.0, "compute": 0.0}
        totals = []
        for runs in (call.forward, call.backward):
            total = FREE
            for run in runs:
                dtype = _main_input(run).dtype
                for kernel in self._kernels(run):
                    compute_bound = kernel.flops / self._device.rate(dtype) > kernel.bytes / self._device.bandwidth
                    times["compute" if compute_bound else "memory"] += roofline(kernel, dtype, self._device)
                    total += kernel
            totals.append(total)
        whole = totals[0] + totals[1]
        if whole == FREE:
            return None
        first = (call.forward or call.backward)[0]
        name, reason = self._choice(first, call.path)
        gradients = [self._choice(run, call.path)[0] for run in call.backward if run.func.namespace == "resfuse"]
        input, output = _main_input(first), _first_tensor(first.output)
        return Layer(
            path=call.path,
            op=_op(first),
            detail=_detail(first),
            shape=tuple(input.shape),
            output_shape=tuple(output.shape),
            dtype=input.dtype,
            backend=name,
            backward_backend=(gradients or [PYTORCH])[-1] if call.backward else None,
            reason=reason,
            launches=whole.launches,
            flops=whole.flops,
            bytes=whole.bytes,
            seconds=sum(times.values()),
            bound=max(times, key=lambda bound: times[bound]),
            forward=totals[0],
            backward=totals[1] if backward else None,
            measured=sum(map(self._seconds, (*call.forward, *call.backward))) if self._measure else None,
        )

    def _kernels(self, run: Run) -> list[Cost]:
        from resfuse.roofline import kernels
        from resfuse.tracing import expanded

        runs = [run]
        if run.func.namespace == "resfuse" and self._choice(run, "")[0] == "reference":
            runs = expanded(run)
        return [kernel for run in runs for kernel in kernels(*run, self._device)]

    def _choice(self, run: Run, path: str) -> tuple[str, str]:
        """The backend, and why."""
        if run.func.namespace != "resfuse":
            around = [name for name in self._left if f"{path}.".startswith(f"{name}." if name else "")]
            if around and _op(run).endswith(_FUSIBLE):
                return PYTORCH, f"not fused: {self._left[max(around, key=len)]}"
            return PYTORCH, "PyTorch's own operator"
        given = _named(run)
        kernel = run.func._overloadpacket.__name__
        kernel = f"{kernel.rpartition('_')[0]}_forward" if kernel.endswith(("_train", "_eval")) else kernel
        weight = given.get("conv_weight")
        convolution = None
        if weight is not None:
            stride, padding, dilation = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
            convolution = Convolution(stride, padding, dilation, given["groups"])
        input = given.get("input", run.args[0])
        problem = Problem(
            kernel, self._place, input.dtype, input.shape, None if weight is None else weight.shape, convolution
        )
        name, rejected = dispatch.explain_choice(problem, self._request)
        if self._request is not None:
            return name, "asked for by name"
        reasons = "; ".join(f"not {other}: {', '.join(why)}" for other, why in rejected.items())
        return name, reasons or "first in the order of preference"

    def _seconds(self, run: Run) -> float:
        """The median time of the operator, alone, on random tensors of such shapes and strides."""
        given = _named(run)
        key = (run.func, repr([(name, _signature(value)) for name, value in given.items()]))
        if key not in self._known:
            self._known[key] = 0.0
            if self._kernels(run):
                with dispatch.use_backend(self._request), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                    self._known[key] = self._timed(run.func, given)
        return self._known[key]

    def _timed(self, func: Any, given: dict[str, Any]) -> float:
        from torch.utils.benchmark import Timer

        assert isinstance(self._place, torch.device)
        if self._place.type == "cuda":
            from triton.testing import do_bench  # which clears the L2 cache between calls

            values = _random(given, self._place)
            return float(do_bench(lambda: func(**values), return_mode="median")) / 1e3
        size = sum(value.nbytes for value in given.values() if isinstance(value, Tensor))
        count = min(_SETS, 2 + 2 * self._device.cache // max(size, 1))
        sets = itertools.cycle([_random(given, self._place) for _ in range(count)])
        timer = Timer("func(**next(sets))", globals={"func": func, "sets": sets}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=_SECONDS).median)


def _named(run: Run) -> dict[str, Any]:
    from resfuse.roofline import named_arguments

    return named_arguments(run.func, run.args, run.kwargs)


def _op(run: Run) -> str:
    name: str = run.func._overloadpacket.__name__
    if run.func.namespace == "resfuse":
        return name.removesuffix("_train").removesuffix("_eval").removesuffix("_forward")
    name = name.removesuffix("_legit").removesuffix("_legit_no_training") if "batch_norm" in name else name
    return name.strip("_").removeprefix("native_")


def _detail(run: Run) -> str:
    """Kernel, stride, groups and residual."""
    given, words = _named(run), []
    weight = given.get("conv_weight", given.get("weight") if "stride" in given else None)
    kernel = given.get("kernel_size") or (weight is not None and weight.shape[2:])
    if kernel:
        stride = given.get("stride") or kernel
        words.append("x".join(map(str, kernel)))
        if set(stride) != {1}:
            words[0] += f"/{stride[0]}" if len(set(stride)) == 1 else f"/{','.join(map(str, stride))}"
    if given.get("groups", 1) != 1:
        words.append(f"g{given['groups']}")
    if run.func.namespace == "resfuse" and "bias" in given and given["residual"] is not None:
        words.append("+res")
    output = _first_tensor(run.output)
    if not output.dtype.is_floating_point:  # such as a batch norm's num_batches_tracked
        words.append(str(output.dtype).removeprefix("torch."))
    return " ".join(words)


def _first_tensor(value: Any) -> Tensor:
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _main_input(run: Run) -> Tensor:
    """The activation: the largest input, the first of several; what an operator without one creates."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((run.args, run.kwargs)) if isinstance(leaf, Tensor)]
    return max(tensors, key=lambda tensor: tensor.dim()) if tensors else _first_tensor(run.output)


def _signature(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _random(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments with data of the strides of the fake ones; variances and the like are positive."""

    def filled(name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [filled(name, item) for item in value]
        if not isinstance(value, Tensor):
            return value
        sizes = [size if stride else 1 for size, stride in zip(value.shape, value.stride(), strict=True)]
        tensor = torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device=device)
        if not value.is_floating_point():
            tensor.zero_()
        elif "var" in name or "invstd" in name:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_()
        return tensor.expand(value.shape)

    return {name: filled(name, value) for name, value in given.items()}


def _find(device: Any, model: nn.Module) -> tuple[Device, torch.device | AbsentDevice]:
    """The machine's description, and the device of torch, or its stand-in if it is not in this machine."""
    from resfuse.roofline import DEVICES, Device

    if device is None:
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        device = torch.device("cpu") if device.type == "meta" else device
    if isinstance(device, str):
        try:
            device = DEVICES.get(device.lower()) or torch.device(device)
        except RuntimeError:
            raise ValueError(
                f"device: expected one of {', '.join(DEVICES)}, or one of torch such as cpu or cuda, got {device!r}"
            ) from None
    if isinstance(device, Device):
        return device, _place(device)
    if not isinstance(device, torch.device):
        found = type(device).__name__
        raise TypeError(f"device: expected a name, a resfuse.roofline.Device or a torch.device, got {found}")
    present = _present(device)
    return _measured(present), present


def _present(device: torch.device) -> torch.device:
    """The device with its index, if it is in this machine."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(f"device: {device} is not in this machine ({count} GPUs)")
    return torch.device("cuda", index)


def _place(device: Device) -> torch.device | AbsentDevice:
    if device.type == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_name(index) == device.name:
                return torch.device("cuda", index)
    if device.capability is None:
        raise ValueError(f"device: {device.name} has no compute capability, which decides what can run on it")
    return AbsentDevice(device.capability)


def _is_here(device: Device) -> bool:
    """Whether a time measured on this machine's CPU is one of the described device; a GPU was found by its name."""
    from resfuse.roofline import processor_name

    return device.type == "cuda" or device.name == processor_name()


@functools.cache
def _measured(device: torch.device) -> Device:
    from resfuse.roofline import measure_device

    return measure_device(device)
