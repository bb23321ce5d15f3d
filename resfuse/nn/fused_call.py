"""Fused calls of several modules: `own_conv_bn_act(conv, bn, input, residual, act)`, `bn_act` and `add_act`.

Everything that is fused in this package runs through here.  The modules own all state: their parameters, buffers and
settings are read at each call, so nothing can go stale.  The modules themselves are called wherever bypassing them
could be noticed: hooks on one of them (or global ones); a class that is not exactly `Conv2d`, `BatchNorm2d` or one
registered as equivalent (so subclasses, and modules with parametrizations, whose class is a subclass); a replaced
`forward`; PyTorch's functions replaced; tensors or parameters of a special type; and transforms that must see PyTorch's
own operators: torch.fx, torch.jit.trace, ONNX export, torch.func, forward-mode AD, and dispatch and function modes.

The checks take two to three microseconds, less than calling the modules does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _torch_module
from torch.nn.parameter import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from resfuse import arguments, functional
from resfuse.nn.batch_norm import (
    BatchNormKind,
    batch_norm_kind,
    count_batch,
    read_state,
    synchronising_group,
)
from resfuse.types import BatchNorm, Pooling

_PLAIN_TENSORS = (Tensor, Parameter)
_PLAIN = BatchNormKind()

# The registries are dictionaries that PyTorch changes in place.
_global_forward_hooks = _torch_module._global_forward_hooks
_global_forward_pre_hooks = _torch_module._global_forward_pre_hooks
_global_backward_hooks = _torch_module._global_backward_hooks
_global_backward_pre_hooks = _torch_module._global_backward_pre_hooks

_transforms_are_active, _tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack

# What the modules would call.
_conv2d, _batch_norm, _relu = F.conv2d, F.batch_norm, F.relu
_conv_forward, _norm_forward, _relu_forward = nn.Conv2d.forward, nn.BatchNorm2d.forward, nn.ReLU.forward


class ConvCall(NamedTuple):
    """A convolution without a module of its own: `F.conv2d` in somebody's forward."""

    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvCall | None:
        """What `Conv2d.forward` calls for this module; None if that is not `F.conv2d` alone."""
        if conv.padding_mode != "zeros" or "_conv_forward" in conv.__dict__:
            return None
        return cls(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def __call__(self, input: Tensor) -> Tensor:
        return F.conv2d(input, *self)


class NormCall(NamedTuple):
    """The normalisation of a batch norm that does more: what `super().forward` is in its forward."""

    module: Any
    kind: BatchNormKind

    def __call__(self, input: Tensor) -> Tensor:
        if self.kind.synchronised:
            return synchronised_forward(self.module, input)
        return nn.BatchNorm2d.forward(self.module, input)


def own_conv_bn_act(
    conv: Any,
    bn: Any,
    input: Tensor,
    residual: Tensor | None = None,
    act: nn.Module | None = None,
    overwrite_residual: bool = False,
    pad_residual: bool = False,
    channels_last: bool = False,
    pooling: Pooling | None = None,
    before: Sequence[Any] = (),
) -> Tensor | None:
    """Call the operator with the state of the modules; None, and nothing has happened, if it cannot replace them.

    Equivalent to::

        output = bn(conv(input))
        if residual is not None:
            output += residual
        return output if act is None else act(output)

    Args:
        conv: a `Conv2d` or `ConvCall`.
        bn: a batch norm, `NormCall` or `BatchNorm`.
        input: (N, C, H, W).
        residual: added before the activation.
        act: a ReLU; None stands for no activation.
        overwrite_residual: the residual is not read afterwards, so inference may write the output over it.
        pad_residual: a residual of fewer channels is added to the first ones.
        channels_last: convert the input to this memory format, which the output then has, too.
        pooling: max pooling of the output, without a residual; the result is None, too, where that is not one call.
        before: calls, with these modules as attributes, of which the first takes the input, each other one the output
            of the one before it, and this one that of the last; None, too, where all of them are not one call.
    """
    if global_hooks() or not _fusible_tensors(input, residual):
        return None
    own = _own(conv, bn, input)
    if own is None:
        return None
    (conv_weight, conv_bias, settings), (state, _, module, _) = own
    calls = []
    for link in before:
        earlier = _own(link.conv, link.bn, input)
        if earlier is None:
            return None
        calls.append((*earlier[0], earlier[1][0], link.act is not None))
        channels_last = channels_last or link.channels_last
    calls.append((conv_weight, conv_bias, settings, state, act is not None))
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    output = functional.inference(input, calls, residual, overwrite_residual, pad_residual, pooling)
    if output is not None or pooling is not None or before:
        return output
    if module is not None and state.training:
        count_batch(module)  # before the call, as in BatchNorm2d: recomputation (checkpoint) may end inside it
    try:
        return functional.packed_conv_bn_act(
            input, conv_weight, conv_bias, settings, state, residual,
            act is not None, overwrite_residual, pad_residual,
        )  # fmt: skip
    except ValueError:
        # Raised before anything is computed.  The modules accept a residual that broadcasts; all else is an error.
        if module is not None:
            count_batch(module, -1)
        _, expected = arguments.convolution(input.shape, conv_weight.shape, *settings)
        if residual is None or pad_residual or residual.shape == expected:
            raise
        return None


def _own(conv: Any, bn: Any, input: Tensor) -> tuple[_Convolution, _Norm] | None:
    """The state of a convolution and a batch norm that one operator can replace, or None."""
    found, norm = _convolution(conv), _norm(bn)
    if found is None or norm is None or norm[3] is not None:
        return None
    if norm[1].frozen and not (
        # It is pointwise arithmetic with type promotion: only so does it keep the convolution's dtype.
        input.dtype is found[0].dtype is norm[0].weight.dtype  # type: ignore[union-attr]
        and not torch.is_autocast_enabled(input.device.type)
    ):
        return None
    return found, norm


def chains(input: Tensor) -> bool:
    """True if convolutions behind one another may be one call."""
    return input.is_cpu and not must_decompose(input) and functional.checked_inference(input) is not None


def bn_act(
    bn: Any,
    input: Tensor,
    residual: Tensor | None = None,
    act: nn.Module | None = None,
    in_place: bool = True,
    pad_residual: bool = False,
) -> Tensor:
    """`act(bn(input) [+ residual])`, fused where nothing can notice; see `own_conv_bn_act`.

    Args:
        in_place: the sum is `output += residual`, so that it has the dtype of bn's output, rather than `+`.
    """
    output = None
    alone = act is None and residual is None and type(bn) is not NormCall and not synchronises(bn)
    norm = None if pad_residual or alone else _norm(bn)
    if norm is not None:
        activation = "identity" if act is None else "relu"
        output = _call_bn_act(norm, input, residual, activation, global_hooks())
    if output is not None:
        return output
    output = _normalise(bn, input)
    if residual is not None and pad_residual:
        output[:, : residual.shape[1]].add_(residual)  # no assignment, which torch.fx could not record
    elif residual is not None and in_place:
        output += residual
    elif residual is not None:
        output = output + residual
    return output if act is None else act(output)


def add_act(input: Tensor, residual: Tensor, act: nn.Module | None, in_place: bool = False) -> Tensor:
    """`act(input + residual)`, fused where nothing can notice.

    Args:
        input, residual: tensors that can be added; the call is fused if both have the same (N, C, H, W) and dtype.
        act: a ReLU, or None.
        in_place: add by `input += residual`, so that the sum has the dtype of the input, which is not read afterwards.
    """
    if act is not None and not global_hooks() and _fusible_tensors(input, residual) and input.shape == residual.shape:
        return functional.add_relu(input, residual)
    if in_place:
        input += residual
    else:
        input = input + residual
    return input if act is None else act(input)


def keeps_dtype(input: Tensor, residual: Tensor) -> bool:
    """True if rounding the residual to the dtype of the convolution's output is a no-op."""
    dtype = input.dtype
    return residual.dtype is dtype and (dtype is not torch.float32 or not torch.is_autocast_enabled(input.device.type))


# (weight, bias, (stride, padding, dilation, groups))
_Convolution = tuple[Any, Any, tuple[Any, Any, Any, int]]
# (state, kind, module whose batches are counted or None, process group that it synchronises over in this call or None)
_Norm = tuple[BatchNorm, BatchNormKind, Any, Any]


def _norm(bn: Any) -> _Norm | None:
    """The state of a batch norm; None if it must be called."""
    if type(bn) is BatchNorm:
        return (bn, _PLAIN, None, None) if bn.eps > 0 else None  # else F.batch_norm raises
    module, kind = bn if type(bn) is NormCall else (bn, batch_norm_kind(bn))
    if kind is None or (module is bn and not unobserved(bn)):
        return None
    try:
        state = read_state(module, kind)
    except KeyError:
        return None
    group = synchronising_group(module, kind) if kind.synchronised else None
    return state, kind, None if kind.frozen else module, group


def _call_bn_act(norm: _Norm, input: Tensor, residual: Tensor | None, activation: str, observed: bool) -> Tensor | None:
    if observed or not _fusible_tensors(input, residual):
        return None
    if residual is not None and residual.shape != input.shape:
        return None
    state, kind, module, group = norm
    if kind.frozen and (state.eps <= 0 or state.weight.dtype is not input.dtype):  # type: ignore[union-attr]
        return None
    if module is not None:
        count_batch(module)
    if group is not None:
        return functional.sync_bn_act(
            input, *state[:4], residual=residual, activation=activation,
            momentum=state.momentum, eps=state.eps, process_group=group,
        )  # fmt: skip
    return functional.bn_act(
        input, *state[:4], residual=residual, activation=activation,
        training=state.training, momentum=state.momentum, eps=state.eps,
    )  # fmt: skip


def synchronises(bn: Any) -> bool:
    """True if a batch norm takes the statistics of several processes in its next call."""
    module, kind = bn if type(bn) is NormCall else (bn, batch_norm_kind(bn))
    return kind is not None and synchronising_group(module, kind) is not None


def _normalise(bn: Any, input: Tensor) -> Tensor:
    """`bn(input)`, where a SyncBatchNorm communicates exactly as the operator does.

    PyTorch's own forward exchanges other values of the same size, and rejects CPU tensors.  Processes must agree even
    if only one of them cannot fuse, because of a hook for example.
    """
    if type(bn) is BatchNorm:
        return F.batch_norm(input, *bn)
    if type(bn) is not nn.SyncBatchNorm or "forward" in bn.__dict__ or torch.compiler.is_compiling():
        return bn(input)
    if not synchronises(bn):
        return bn(input)
    bn.forward = functools.partial(synchronised_forward, bn)  # type: ignore[method-assign]
    try:
        return bn(input)
    finally:
        del bn.forward


def synchronised_forward(bn: Any, input: Tensor) -> Tensor:
    """The forward of a SyncBatchNorm whose hooks the caller runs."""
    norm = _norm(NormCall(bn, BatchNormKind(synchronised=True)))
    output = None if norm is None or norm[3] is None else _call_bn_act(norm, input, None, "identity", False)
    return nn.SyncBatchNorm.forward(bn, input) if output is None else output


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
    attributes = module.__dict__  # reads of modules of many classes are slow
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def global_hooks() -> bool:
    """True if hooks for all modules are registered, or what the modules call was replaced."""
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    ) or not (
        F.conv2d is _conv2d
        and F.batch_norm is _batch_norm
        and F.relu is _relu
        and nn.Conv2d.forward is _conv_forward
        and nn.BatchNorm2d.forward is _norm_forward
        and nn.ReLU.forward is _relu_forward
    )


def plain_convolution(conv: Any) -> bool:
    """True if nothing on a convolution observes or keeps its input or output."""
    if type(conv) is ConvCall:
        return True
    return type(conv) is nn.Conv2d and unobserved(conv) and "_conv_forward" not in conv.__dict__


def _convolution(conv: Any) -> _Convolution | None:
    """The state of a convolution; None if it must be called."""
    if type(conv) is ConvCall:
        plain = type(conv.weight) in _PLAIN_TENSORS or torch.compiler.is_compiling()
        return (conv.weight, conv.bias, conv[2:]) if plain and not isinstance(conv.padding, str) else None
    if type(conv) is not nn.Conv2d or not unobserved(conv):
        return None
    attributes = conv.__dict__
    if attributes["padding_mode"] != "zeros":
        return None
    if "_conv_forward" in attributes or "weight" in attributes or "bias" in attributes:
        return None
    padding, parameters = attributes["padding"], attributes["_parameters"]
    if type(padding) is str:
        padding = _symmetric_padding(conv)
    weight = parameters.get("weight")
    if padding is None or "bias" not in parameters:
        return None
    if type(weight) not in _PLAIN_TENSORS and (weight is None or not torch.compiler.is_compiling()):
        return None
    return weight, parameters["bias"], (attributes["stride"], padding, attributes["dilation"], attributes["groups"])


def reason_against(conv: Any, bn: Any) -> str | None:
    """Why `own_conv_bn_act` (or, with `conv=None`, `bn_act`) would call these rather than the operator, or None."""
    if isinstance(conv, nn.Module) and type(conv) is not nn.Conv2d:
        parametrized = nn.utils.parametrize.is_parametrized(conv)
        return f"{type(conv).__name__} {'has a parametrization' if parametrized else 'is not exactly Conv2d'}"
    if isinstance(bn, nn.Module) and batch_norm_kind(bn) is None:
        return f"{type(bn).__name__} is not exactly BatchNorm2d"
    for module in (conv, bn):
        name = type(module).__name__
        if isinstance(module, nn.Module):
            if "forward" in module.__dict__:
                return f"the forward of {name} was replaced on the instance"
            if not unobserved(module):
                return f"{name} has hooks"
    if conv is not None and _convolution(conv) is None:
        if conv.padding_mode != "zeros":
            return f"padding_mode={conv.padding_mode!r}"
        if isinstance(conv.padding, str) and _symmetric_padding(conv) is None:
            return f"padding={conv.padding!r} is asymmetric"
        return "a parameter or method of Conv2d was replaced on the instance"
    return None if _norm(bn) is not None else f"a parameter or buffer of {type(bn).__name__} was replaced"


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
    if _transforms_are_active():
        return True
    if torch.compiler.is_compiling():
        return _traced_as_pytorch or torch.onnx.is_in_onnx_export()
    return (
        type(input) not in _PLAIN_TENSORS
        or input.is_meta
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or (  # a mode other than that of `torch.device` and `set_default_device`
            _function_modes() > 0
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


def _symmetric_padding(conv: nn.Conv2d) -> Any:
    """`padding="same"` or `"valid"` as a pair of numbers; None if the two sides differ."""
    if conv.padding == "valid":
        return 0, 0
    vertical, horizontal = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return None if vertical % 2 or horizontal % 2 else (vertical // 2, horizontal // 2)
