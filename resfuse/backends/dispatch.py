"""The choice of the backend for a problem: made here alone, once per problem, and with reasons.

Automatic choice takes the backend that was fastest on this GPU where a table has the problem (measured.py), else the
first in `PREFERENCE` that supports it, unless `RANKING` names a faster one, and logs why it passed over the others; on
a GPU, one whose kernel has been right there (first_contact.py).  An explicit request (`use_backend`, or the environment
variable RESFUSE_BACKEND) that cannot be met raises; only a kernel that the requested backend does not declare goes to
`reference`: the gradients of convolutions, which are cuDNN's on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from resfuse import arguments
from resfuse.backends import first_contact, measured
from resfuse.layout import is_channels_last, share_storage
from resfuse.types import AbsentDevice, Convolution, InferenceCall, Pooling, Problem

logger = logging.getLogger("resfuse")

PREFERENCE = ("cuda", "triton", "sm90", "cpu", "reference")

UNRANKED = ("cudnn", "sm100")
"""Chosen by name, `cudnn` also where a table has it as the fastest."""

PREDICTED = "predicted, not measured"

MARGIN = 1.02
"""A backend must be faster than the predicted one by this factor to take its place: less may be noise.

`reference`, which is eager PyTorch, takes it whenever it was faster."""


class Backend(Protocol):
    """The declarations of a backend module, beside the kernel API that `resfuse.backends.reference` specifies.

    One may also have `inference_route`, from which `Route` takes an operator that checks its tensors itself.
    """

    KERNELS: tuple[str, ...]
    """The functions of the kernel API that it implements."""

    def unavailable_reason(self) -> str | None:
        """Why it cannot be used on this machine, or None."""

    def only_on_request_reason(self) -> str | None:
        """Why automatic choice never takes it, or None."""

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run a problem, as far as dtype, device and shapes tell."""


class Ranking(NamedTuple):
    """`preferred` runs these kernels before `passed_over`, though it comes later in `PREFERENCE`."""

    kernels: tuple[str, ...]
    passed_over: str
    preferred: str
    majors: tuple[int, ...]
    """CUDA devices with such a compute capability: 9 is Hopper."""
    dtypes: tuple[torch.dtype, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.preferred} should be faster: {self.why} ({PREDICTED})"

    def applies(self, name: str, problem: Problem) -> bool:
        return (
            self.passed_over == name
            and problem.kernel in self.kernels
            and problem.dtype in self.dtypes
            and problem.device.type == "cuda"
            and problem.capability[0] in self.majors
        )


# An entry moves nobody who asks for a backend by name, and counts only where the preferred backend can run the problem
# and no table has measured it.
RANKING = (
    Ranking(
        ("conv_bn_act_forward", "conv_forward"),
        passed_over="cuda",
        preferred="triton",
        majors=(9, 10, 11),  # not 12, which has mma.sync alone
        # For float32 it is true in TF32; without that neither uses tensor cores, and nothing is predicted.
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        why="it multiplies by wgmma or tcgen05, which are faster than the mma.sync of cuda",
    ),
    *(
        Ranking(
            ("conv_bn_act_forward", "conv_forward"),
            passed_over=name,
            preferred="sm90",
            majors=(9,),
            dtypes=(torch.bfloat16, torch.float16, torch.float32),
            why="TMA loads the operands and residuals of its next tile while wgmma multiplies",
        )
        for name in ("cuda", "triton")
    ),
)


recomputing: ContextVar[bool] = ContextVar("resfuse_recomputing", default=False)
"""Outputs are computed again rather than kept, and a backend may have memory of its own for them."""

_registered: dict[str, Backend] = {}


def register(name: str, module: Any) -> None:
    """Add a backend from outside the package.  It has no rank: `use_backend` takes it, automatic choice never does.

    Args:
        name: the name for `use_backend`; a name that is taken stays with its owner.
        module: a `Backend` with the functions that it declares in KERNELS.
    """
    if name in (*PREFERENCE, *UNRANKED) or _registered.get(name, module) is not module:
        raise ValueError(f"a backend named {name!r} exists already")
    _registered[name] = module


def validated(name: str | None) -> str | None:
    """The name, if there is a backend of this name, or None.

    Raises:
        ValueError: there is none.
    """
    names = (*PREFERENCE, *UNRANKED, *_registered)
    if name is not None and name not in names:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, names))} or None, got {name!r}")
    return name


_from_environment = validated(os.environ.get("RESFUSE_BACKEND") or None)
_request: ContextVar[str | None] = ContextVar("resfuse_backend", default=_from_environment)

requested_backend = _request.get
"""The backend asked for by `use_backend` or RESFUSE_BACKEND, None where the choice is automatic."""


def backend(name: str) -> Any:
    """The module that implements a backend's kernels."""
    return _registered.get(name) or cast(Any, importlib.import_module(f"resfuse.backends.{name}"))


def unavailable_reasons() -> dict[str, str | None]:
    """Backend name -> None where it can be used on this machine, else why not."""
    return {name: backend(name).unavailable_reason() for name in PREFERENCE}


def available_backends() -> list[str]:
    """Names of the backends usable on this machine, in order of preference: `["cpu", "reference"]` without a GPU.

    Example:
        >>> available_backends()[-1]
        'reference'
    """
    return [name for name, reason in unavailable_reasons().items() if reason is None]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the context, and later its backward, on the named backend; `None` means automatic choice.

    Args:
        name: one of `available_backends()`, "cudnn" or "sm100", which are never chosen by rank, or None.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot be used on this machine (the message says why).  An op that the backend
            does not support raises the same error when it is called.

    Example:
        >>> with use_backend("reference"):
        ...     requested_backend()
        'reference'
    """
    if validated(name) is not None:
        reason = backend(str(name)).unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = _request.set(name)
    try:
        yield
    finally:
        _request.reset(token)


def explain_choice(problem: Problem, request: str | None = None) -> tuple[str, dict[str, list[str]]]:
    """Name of the chosen backend, and for every backend that was preferred to it the reasons against it."""
    choice = choose(problem, request)
    return choice.name, {other: list(reasons) for other, reasons in choice.rejected.items()}


def through_dispatcher() -> bool:
    """True if a call has to pass PyTorch's dispatcher, because a compiler or a TorchDispatchMode wants to see it.

    Otherwise the backend is called directly, which saves 6 to 11 us per call.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def must_differentiate(grad_output: Tensor) -> bool:
    """True if a backward pass has to consist of differentiable operations that PyTorch can transform.

    With create_graph=True the gradient is itself differentiated; with is_grads_batched=True it runs under vmap.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return (
        torch.is_grad_enabled()
        or functorch.is_batchedtensor(grad_output)
        or functorch.is_legacy_batchedtensor(grad_output)
    )


IN_FORCE = "in force"


def backend_for(
    kernel: str,
    input: Tensor,
    weight_shape: torch.Size | None = None,
    convolution: Convolution | None = None,
    request: str | None = IN_FORCE,
    training: bool = False,
    residual: bool = False,
) -> Any:
    """The backend that runs `kernel` on a tensor like `input`.

    `request` is a backend's name or None for automatic choice: the one in force at the forward that a backward belongs
    to, or, by default, the one in force now.  The last two tell forward convolutions with batch norm apart.
    """
    dtype = input.dtype
    tf32 = weight_shape is not None and dtype is torch.float32 and input.is_cuda and uses_tf32()
    # A plain tuple hashes and compares like the Problem that `choose` makes of it, and is made faster.
    problem = (kernel, input.device, dtype, input.shape, weight_shape, convolution, training, residual, tf32)
    try:
        return choose(problem, _request.get() if request is IN_FORCE else request)[1]
    except first_contact.UnsettledError as error:  # for as long as a graph is captured: not a choice to remember
        logger.warning("reference runs %s: %s", kernel, error)
        return backend("reference")


def uses_tf32() -> bool:
    """PyTorch's switch for float32 convolutions on a GPU; reading it takes a microsecond."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def checked_inference(input: Tensor) -> Any:
    """The function that takes unchecked arguments of convolutions in inference, or None: `cpu_conv.checked_inference`
    for what lies on the CPU, `_routed_inference` elsewhere.
    """
    return _checked_inference(_request.get(), input.is_cpu, input.dtype)


@functools.cache
def _checked_inference(request: str | None, on_cpu: bool, dtype: torch.dtype) -> Any:
    if on_cpu and request in (None, "cpu"):
        usable = dtype in (torch.float32, torch.bfloat16) and backend("cpu").unavailable_reason() is None
        return backend("cpu").checked_inference if usable else None
    return _routed_inference if request is None or hasattr(backend(request), "inference_route") else None


def _routed_inference(
    input: Tensor,
    calls: Sequence[InferenceCall],
    residual: Tensor | None,
    overwrite_residual: bool,
    pad_residual: bool,
    pooling: Pooling | None = None,
) -> Tensor | None:
    """One convolution by an operator that checks its tensors itself; None where that is not all.

    What goes wrong is left to the caller, who finds the words: nothing has been written then.
    """
    if pooling is not None or len(calls) > 1:
        return None
    ((conv_weight, conv_bias, settings, bn, relu),) = calls
    mean, var, weight, bias, _, _, eps = bn
    dtype = input.dtype
    if mean is None or var is None or (conv_bias is not None and conv_bias.dtype is not dtype):
        return None
    # In channels_last nothing is left to fail behind the kernel that writes: else its output may have to be copied.
    overwritten = (
        residual is not None and overwrite_residual and is_channels_last(input) and not share_storage(residual, input)
    )
    tf32 = dtype is torch.float32 and input.is_cuda and uses_tf32()
    try:
        route = _route(
            _request.get(), input.device, dtype, input.shape, conv_weight.shape, settings, residual is not None, tf32,
            eps, relu, overwritten,
        )  # fmt: skip
    except (TypeError, ValueError, RuntimeError):  # settings without a hash, or out of range; no verdict, or no backend
        return None
    if route is None or (residual is not None and residual.shape != route.shape):
        return None
    try:
        output: Tensor = route.operator(
            input, conv_weight, conv_bias, mean, var, weight, bias, residual, *route.settings
        )
    except RuntimeError:
        return None
    return output


class Route(NamedTuple):
    """How a backend computes a problem in inference, but for the tensors."""

    operator: Any
    """It takes input, conv_weight, conv_bias, batch norm's four tensors and the residual, all of which it checks."""
    settings: tuple[Any, ...]
    """Its further arguments."""
    shape: tuple[int, ...]
    """Of the output."""


@functools.lru_cache(maxsize=4096)
def _route(
    request: str | None, device: torch.device, dtype: torch.dtype, shape: torch.Size, weight_shape: torch.Size,
    settings: tuple[Any, Any, Any, int], residual: bool, tf32: bool, *options: Any,
) -> Route | None:  # fmt: skip
    """That of the backend of choice; None where it has none, and takes checked arguments alone."""
    convolution, output_shape = arguments.convolution(shape, weight_shape, *settings)
    fields = ("conv_bn_act_forward", device, dtype, shape, weight_shape, convolution, False, residual, tf32)
    module: Any = choose(fields, request).module
    found = module.inference_route(Problem(*fields), *options) if hasattr(module, "inference_route") else None
    if found is None:
        return None
    operator, further = found
    return Route(operator, further, output_shape)


class Choice(NamedTuple):
    """The backend for a problem."""

    name: str
    module: Any
    rejected: dict[str, tuple[str, ...]]
    """The reasons against those that were preferred to it, or that were measured beside it."""
    measured: str | None = None
    """The times that decided, None where the order of preference did."""


# A choice stays right: the arguments and this machine decide which kernels may run, and a library that is loaded later
# calls `forget_choices`.  Tables only say which is fastest: a process keeps to those that it read first, so that the
# bits of a model do not change while it runs, until `resfuse tune`, which writes them, calls `forget_choices` too.
@functools.lru_cache(maxsize=4096)
def choose(fields: tuple[Any, ...], request: str | None) -> Choice:
    """The choice for a problem.

    `fields` are those of a `Problem`; `request` is a backend's name, or None for automatic choice.
    """
    problem = Problem(*fields)
    names = PREFERENCE if request is None else (request,)
    if request is not None and problem.kernel not in backend(request).KERNELS:
        names = ("reference",)
    rejected: dict[str, tuple[str, ...]] = {}
    for name in names:
        reasons = reasons_against(name, problem, automatic=request is None)
        if not reasons and request is None:
            reasons = tuple(  # another backend, which can run the problem, is preferred to this one
                str(entry)
                for entry in RANKING
                if entry.applies(name, problem) and not reasons_against(entry.preferred, problem, automatic=True)
            )
        if not reasons:
            choice = Choice(name, backend(name), rejected)
            choice = choice if request is not None else _by_table(problem, choice)
            if choice.rejected:
                logger.debug("%s runs on %r: %s", problem, choice.name, choice.rejected)
            return choice
        rejected[name] = reasons
    listed = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in rejected.items())
    raise RuntimeError(f"no backend can run {problem}:\n{listed}")


def _by_table(problem: Problem, predicted: Choice) -> Choice:
    """The choice by a table's times, where one has the problem; else the predicted one."""
    found = measured.lookup(problem)
    if found is None:
        return predicted
    batch, (times, left_out, _) = found
    if predicted.name not in {*times, *left_out}:  # it could not run there then, which says nothing about its speed
        return predicted
    # Recomputation has the bits of forward only from kernels of ours behind the convolution: in training PyTorch's
    # convolution is that of `cudnn`.
    order = sorted(times.keys() - ({"reference"} if problem.training else set()), key=times.__getitem__)
    rejected: dict[str, tuple[str, ...]] = {name: (f"when measured: {why}",) for name, why in left_out.items()}
    try:
        for fastest in order:
            reasons = reasons_against(fastest, problem, automatic=True)
            if not reasons:
                break
            rejected[fastest] = reasons
        else:
            return predicted
    except first_contact.UnsettledError:  # while a graph is captured: the predicted one has its verdict
        return predicted
    time = times.get(predicted.name, math.inf)
    within = time <= MARGIN * times[fastest] and (problem.training or time <= times.get("reference", math.inf))
    name = predicted.name if within else fastest
    where = problem.device_name if batch == problem.shape[0] else f"{problem.device_name} at batch {batch}"
    listed = ", ".join(f"{other} {times[other]:.1f} us" for other in order)
    text = f"measured on {where}: {listed}"
    return Choice(name, backend(name), {other: (text,) for other in order if other != name} | rejected, text)


def forget_choices() -> None:
    """Choose anew at the next call: a library has been loaded, or a table written, since."""
    measured.forget()
    choose.cache_clear()
    _checked_inference.cache_clear()
    _route.cache_clear()


def reasons_against(name: str, problem: Problem, automatic: bool) -> tuple[str, ...]:
    """Why a backend cannot run a problem or, with `automatic`, is not to run it unasked."""
    module = backend(name)
    if problem.kernel not in module.KERNELS:
        return (f"{name} does not implement {problem.kernel}",)
    if not isinstance(problem.device, AbsentDevice):  # for which this machine does not matter
        unavailable = module.unavailable_reason() or (module.only_on_request_reason() if automatic else None)
        if unavailable:
            return (unavailable,)
    reasons = tuple(module.unsupported_reasons(problem))
    if reasons or not automatic or isinstance(problem.device, AbsentDevice):
        return reasons
    objection = first_contact.objection(name, problem)
    return (objection,) if objection else ()
