"""Fused calls of several modules: `conv_bn_act(conv, bn, input, residual, act)` is `act(bn(conv(input)) + residual)`.

Everything that is fused in this package runs through here.  The modules own all state: their parameters, buffers and
settings are read at each call, so nothing can go stale.  The modules themselves are called wherever bypassing them
could be noticed: hooks on one of them (or global ones); a class that is not exactly `Conv2d`, `BatchNorm2d` or one
registered as equivalent (so subclasses, and modules with parametrizations, whose class is a subclass); a replaced
`forward`; tensors or parameters of a special type; and transforms that must see PyTorch's own operators: torch.fx,
torch.jit.trace, ONNX export, torch.func, forward-mode AD, and dispatch and function modes.

The checks take two to three microseconds, less than calling the modules does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _torch_module
from torch.nn.parameter import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from resfuse import arguments, functional
from resfuse.nn.batch_norm import BatchNormKind, batch_norm_kind, count_batch, read_state, synchronising_group

_PLAIN_TENSORS = (Tensor, Parameter)
_PLAIN = BatchNormKind()

# The registries are dictionaries that PyTorch changes in place.
_global_forward_hooks = _torch_module._global_forward_hooks
_global_forward_pre_hooks = _torch_module._global_forward_pre_hooks
_global_backward_hooks = _torch_module._global_backward_hooks
_global_backward_pre_hooks = _torch_module._global_backward_pre_hooks


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    act: nn.Module | None = None,
    overwrite_residual: bool = False,
    pad_residual: bool = False,
) -> Tensor:
    """`act(bn(conv(input)) [+ residual])`, fused where nothing can notice.

    Equivalent to::

        output = bn(conv(input))
        if residual is not None:
            output += residual
        return output if act is None else act(output)

    Args:
        conv, bn, act: the modules; `act=None` stands for no activation.
        input: (N, C, H, W).
        residual: added before the activation; broadcast to the shape and rounded to the dtype of bn's output.
        overwrite_residual: the residual is not read afterwards, so inference may write the output over it.
        pad_residual: a residual of fewer channels is added to the first ones (and does not broadcast).
    """
    activation = activation_of(act)
    output = _own_conv_bn_act(conv, bn, input, residual, activation or "identity", overwrite_residual, pad_residual)
    if output is None:
        z = conv(input)
        if not pad_residual and synchronises(bn):
            return bn_act(bn, z, residual, act)
        return _add_and_activate(_normalise(bn, z), residual, act, pad_residual)
    return output if activation is not None else act(output)  # type: ignore[misc]


def bn_act(bn: nn.Module, input: Tensor, residual: Tensor | None = None, act: nn.Module | None = None) -> Tensor:
    """`act(bn(input) [+ residual])`, fused where nothing can notice; see `conv_bn_act`."""
    activation = activation_of(act)
    kind, output = batch_norm_kind(bn), None
    if kind is not None and unobserved(bn):
        inner = _inner_activation(bn, kind, residual)
        if inner is not None:
            output = own_bn_act(bn, input, residual, _either(inner, activation), kind)
    if output is None:
        return _add_and_activate(_normalise(bn, input), residual, act)
    return output if activation is not None else act(output)  # type: ignore[misc]


def add_act(input: Tensor, residual: Tensor, act: nn.Module, in_place: bool = False) -> Tensor:
    """`act(input + residual)`, fused where nothing can notice.

    Args:
        input, residual: tensors that can be added; the call is fused if both have the same (N, C, H, W) and dtype.
        act: the activation.
        in_place: add by `input += residual`, so that the sum has the dtype of the input, which is not read afterwards.
    """
    relu = activation_of(act) == "relu" and not global_hooks()
    if relu and _fusible_tensors(input, residual) and input.shape == residual.shape:
        return functional.add_relu(input, residual)
    if in_place:
        input += residual
        return act(input)
    return act(input + residual)


def keeps_dtype(input: Tensor, residual: Tensor) -> bool:
    """True if rounding the residual to the dtype of the convolution's output is a no-op."""
    dtype = input.dtype
    return residual.dtype is dtype and (dtype is not torch.float32 or not torch.is_autocast_enabled(input.device.type))


def own_bn_act(
    bn: nn.Module,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    kind: BatchNormKind = _PLAIN,
    called: bool = False,
) -> Tensor | None:
    """Call the operator with a batch norm's state; None if it cannot be used.

    Ignores hooks on `bn` and an activation that `bn` applies itself, so it can serve inside its `forward`; `called`
    says that it does, where global hooks have run already.
    """
    if (not called and global_hooks()) or not _fusible_tensors(input, residual):
        return None
    if residual is not None and residual.shape != input.shape:
        return None
    try:
        state = read_state(bn, kind.frozen)
    except KeyError:
        return None
    if kind.frozen and (state.weight is None or state.weight.dtype is not input.dtype):
        return None
    group = synchronising_group(bn, kind)
    if not kind.frozen:
        count_batch(bn)
    if group is not None:
        return functional.sync_bn_act(
            input, *state[:4], residual=residual, activation=activation,
            momentum=state.momentum, eps=state.eps, process_group=group,
        )  # fmt: skip
    return functional.bn_act(
        input, *state[:4], residual=residual, activation=activation,
        training=state.training, momentum=state.momentum, eps=state.eps,
    )  # fmt: skip


def synchronises(bn: nn.Module) -> bool:
    """True if a batch norm takes the statistics of several processes in its next call."""
    kind = batch_norm_kind(bn)
    return kind is not None and synchronising_group(bn, kind) is not None


def _normalise(bn: nn.Module, input: Tensor) -> Tensor:
    """`bn(input)`, where a SyncBatchNorm communicates exactly as the operator does.

    PyTorch's own forward exchanges other values of the same size, and rejects CPU tensors.  Processes must agree even
    if only one of them cannot fuse, because of a hook for example.
    """
    if type(bn) is not nn.SyncBatchNorm or "forward" in bn.__dict__ or torch.compiler.is_compiling():
        return bn(input)
    if not synchronises(bn):
        return bn(input)
    bn.forward = functools.partial(synchronised_forward, bn)  # type: ignore[method-assign]
    try:
        return bn(input)
    finally:
        del bn.forward


def synchronised_forward(bn: nn.Module, input: Tensor) -> Tensor:
    """The forward of a SyncBatchNorm whose hooks the caller runs."""
    output = own_bn_act(bn, input, None, "identity", BatchNormKind(synchronised=True), called=True)
    return nn.SyncBatchNorm.forward(bn, input) if output is None else output  # type: ignore[arg-type]


def _own_conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    overwrite_residual: bool,
    pad_residual: bool,
) -> Tensor | None:
    """Call the operator with the state of both modules; None if it cannot replace them."""
    kind = batch_norm_kind(bn)
    if (
        kind is None
        or type(conv) is not nn.Conv2d
        or conv.padding_mode != "zeros"
        or "_conv_forward" in conv.__dict__
        or not unobserved(conv)
        or not unobserved(bn)
        or global_hooks()
        or not _fusible_tensors(input, residual)
        or (kind.synchronised and synchronising_group(bn, kind) is not None)
    ):
        return None
    inner = _inner_activation(bn, kind, residual)
    padding: Any = _symmetric_padding(conv) if isinstance(conv.padding, str) else conv.padding
    if inner is None or padding is None:
        return None
    try:
        conv_weight, conv_bias = conv._parameters["weight"], conv._parameters["bias"]
        state = read_state(bn, kind.frozen)
    except KeyError:
        return None
    if conv_weight is None or (type(conv_weight) not in _PLAIN_TENSORS and not torch.compiler.is_compiling()):
        return None
    if kind.frozen and not (
        # It is pointwise arithmetic with type promotion: only so does it keep the convolution's dtype.
        input.dtype is conv_weight.dtype is state.weight.dtype  # type: ignore[union-attr]
        and not torch.is_autocast_enabled(input.device.type)
    ):
        return None
    if not kind.frozen:
        count_batch(bn)  # before the call, as in BatchNorm2d: recomputation (checkpoint) may end inside it
    try:
        return functional.conv_bn_act(
            input, conv_weight, *state[:4],
            conv_bias=conv_bias, residual=residual, activation=_either(inner, activation),
            stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups,  # type: ignore[arg-type]
            training=state.training, momentum=state.momentum, eps=state.eps,
            overwrite_residual=overwrite_residual, pad_residual=pad_residual,
        )  # fmt: skip
    except ValueError:
        # Raised before anything is computed.  The modules accept a residual that broadcasts; all else is an error.
        if not kind.frozen:
            count_batch(bn, -1)
        settings: Any = (conv.stride, padding, conv.dilation, conv.groups)
        _, expected = arguments.convolution(input.shape, conv_weight.shape, *settings)
        if residual is None or pad_residual or residual.shape == expected:
            raise
        return None


def activation_of(act: nn.Module | None) -> str | None:
    """The operator's equivalent of a module, "relu" or "identity"; None if the module must be called."""
    if act is None:
        return "identity"
    cls = type(act)
    if (cls is nn.ReLU or cls is nn.Identity) and unobserved(act):
        return "relu" if cls is nn.ReLU else "identity"
    return None


def unobserved(module: nn.Module) -> bool:
    """True if no hook or replaced `forward` on the module itself would notice that it is bypassed."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def global_hooks() -> bool:
    """True if hooks for all modules are registered."""
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def reasons_against(conv: nn.Module | None, bn: nn.Module, residual: bool = False) -> list[str]:
    """Reasons for `conv_bn_act` (or, with `conv=None`, `bn_act`) to call these modules rather than the operator."""
    reasons = [] if conv is None else _convolution_reasons(conv)
    kind, name = batch_norm_kind(bn), type(bn).__name__
    if kind is None:
        reasons.append(f"{name} is not exactly BatchNorm2d")
    elif kind.activated and _inner_activation(bn, kind, None) is None:
        reasons.append(f"{name} has an activation other than ReLU, a drop layer, or hooks on them")
    elif kind.activated and residual and _inner_activation(bn, kind, True) is None:
        reasons.append(f"{name} applies its activation before the residual is added")
    else:
        try:
            read_state(bn, kind.frozen)
        except KeyError:
            reasons.append(f"a parameter or buffer of {name} was replaced")
    return reasons + _observed_reasons(bn)


def _observed_reasons(module: nn.Module) -> list[str]:
    """Reasons not to bypass a module: hooks, or a `forward` set on the instance."""
    if "forward" in module.__dict__:
        return [f"the forward of {type(module).__name__} was replaced on the instance"]
    return [] if unobserved(module) else [f"{type(module).__name__} has hooks"]


def _convolution_reasons(conv: nn.Module) -> list[str]:
    if type(conv) is not nn.Conv2d:
        parametrized = nn.utils.parametrize.is_parametrized(conv)
        return [f"{type(conv).__name__} {'has a parametrization' if parametrized else 'is not exactly Conv2d'}"]
    reasons = []
    if conv.padding_mode != "zeros":
        reasons.append(f"padding_mode={conv.padding_mode!r}")
    elif isinstance(conv.padding, str) and _symmetric_padding(conv) is None:
        reasons.append(f"padding={conv.padding!r} is asymmetric")
    if "_conv_forward" in conv.__dict__:
        reasons.append("the _conv_forward of Conv2d was replaced on the instance")
    if not {"weight", "bias"} <= conv._parameters.keys() or type(conv._parameters["weight"]) not in _PLAIN_TENSORS:
        reasons.append("the weight of Conv2d is not a plain parameter")
    return reasons + _observed_reasons(conv)


def _add_and_activate(
    output: Tensor, residual: Tensor | None, act: nn.Module | None, pad_residual: bool = False
) -> Tensor:
    if residual is not None and pad_residual:
        output[:, : residual.shape[1]].add_(residual)  # no assignment, which torch.fx could not record
    elif residual is not None:
        output += residual  # in place, as in torchvision: the dtype is that of the output
    return output if act is None else act(output)


def _fusible_tensors(input: Tensor, residual: Tensor | None) -> bool:
    """True if the inputs and PyTorch's active modes allow an operator in place of the modules."""
    if must_decompose(input) or input.dim() != 4:
        return False
    if residual is None:
        return True
    # A residual of another dtype is rounded to that of the output, in place.  Under autocast, which chooses that dtype,
    # it is only known if the convolution's input already has the lower precision.
    return keeps_dtype(input, residual)


def must_decompose(input: Tensor) -> bool:
    """True if a transform, a tracer, a mode or a tensor subclass must see PyTorch's own operators."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return _traced_as_pytorch or torch.onnx.is_in_onnx_export()
    return (
        type(input) not in _PLAIN_TENSORS
        or input.is_meta
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or (  # a mode other than that of `torch.device` and `set_default_device`
            torch._C._len_torch_function_stack() > 0
            and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        )
    )


_traced_as_pytorch = False


@contextmanager
def traced_as_pytorch() -> Iterator[None]:
    """Within the context, tracing a model records PyTorch's own operators, as if nothing were fused."""
    global _traced_as_pytorch
    before, _traced_as_pytorch = _traced_as_pytorch, True
    try:
        yield
    finally:
        _traced_as_pytorch = before


def _either(inner: str, outer: str | None) -> str:
    """A batch norm's own activation and the one after it as one: ReLU if either is."""
    return "relu" if inner == "relu" or outer == "relu" else "identity"


def _inner_activation(bn: nn.Module, kind: BatchNormKind, residual: Any) -> str | None:
    """The activation that a batch norm applies itself; None if the module must be called."""
    if not kind.activated:
        return "identity"
    modules = bn._modules
    drop = modules.get("drop")
    if drop is not None and activation_of(drop) != "identity":
        return None
    activation = activation_of(modules.get("act"))
    return None if activation == "relu" and residual is not None else activation


def _symmetric_padding(conv: nn.Conv2d) -> Any:
    """`padding="same"` or `"valid"` as a pair of numbers; None if the two sides differ."""
    if conv.padding == "valid":
        return 0, 0
    vertical, horizontal = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return None if vertical % 2 or horizontal % 2 else (vertical // 2, horizontal // 2)
