"""Tensors that are computed once it is known what follows them.

A forward that is to run fused makes its calls through `call`, `invoke`, `method`, `add` and `add_`.  A convolution then
returns a `Lazy`, batch norm and a residual extend it, and a ReLU, or any other reader, evaluates it: in one fused call,
if it has become one, else by the calls as they were written.  Nothing is frozen: the modules, their settings and the
control flow between them are those of this call, so hooks, replaced children and changed attributes count at once.

`resfuse.fuse` writes such forwards from those of other people's modules, and those of `resfuse.nn` are written so by
hand.  What they have to keep to:

- A `Lazy` is held by one variable or expression, and never reaches code that does not know of it.
- What follows it may change nothing that it still has to read (`guard`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import Parameter

from resfuse.layout import share_storage
from resfuse.nn import fused_call
from resfuse.nn.batch_norm import BatchNormKind, batch_norm_kind
from resfuse.nn.fused_call import ConvCall, NormCall, activation_of, global_hooks, plain_convolution, unobserved
from resfuse.nn.max_pool import pooled, pooling_of
from resfuse.types import BatchNorm

RELU = nn.ReLU()
"""Stands for a ReLU that is written as a function."""

# Who else can have a value: anybody; nobody in Python; nobody, and its memory was made by a fused call.
SHARED, UNSHARED, OWN = range(3)

FORWARDS: dict[Any, Callable[..., Any]] = {}
"""forward of a class -> the same for a caller that can take a `Lazy`.  A class that overrides it does not match."""


class Symbol(fx.Proxy):
    """Stands for a tensor while `fuse_` follows a forward; `tracer` hears what would be computed."""

    tracer: Any


_TENSORS = (Tensor, Parameter, Symbol)

_UPDATES: WeakValueDictionary[int, Lazy] = WeakValueDictionary()
"""By the `id` of a running mean: the last call that updates it, for as long as somebody holds that."""


def _is_tensor(x: Any) -> bool:
    """True for what a fused call can take; compilers trace with classes of their own."""
    return type(x) in _TENSORS or (isinstance(x, Tensor) and torch.compiler.is_compiling())


class Lazy:
    """`bn(conv(input)) + residual` (each part may be missing) that is still to be computed, or a value.

    `conv` is a module or `ConvCall`, `bn` a module, `NormCall` or `BatchNorm`.
    """

    value: Any = None
    held: int = SHARED
    residual: Any = None
    in_place: bool = False
    """The sum is written `a += b`: its dtype and shape are those of a."""
    pad: int = 0
    """The residual, or where there is none the input, lacks so many channels of zeros."""
    consume: bool = False
    """The residual is not read afterwards."""
    act: nn.Module | None = None
    """An activation that is to be computed with it; it waits for max pooling or a convolution (`activate`)."""
    before: tuple[Lazy, ...] = ()
    """Convolutions with activations, of which the first takes the input and this one what the last computes."""

    def __init__(self, conv: Any, bn: Any, input: Any, channels_last: bool = False) -> None:
        self.conv, self.bn, self.input, self.channels_last = conv, bn, input, channels_last

    @classmethod
    def of(cls, value: Any, held: int) -> Lazy:
        """An evaluated one."""
        lazy = cls(None, None, None)
        lazy.value, lazy.held = value, held
        return lazy

    def normalise(self, bn: Any) -> Lazy:
        """With a batch norm.  Earlier calls that update the same statistics are computed first."""
        self.bn = bn
        module = bn.module if type(bn) is NormCall else bn
        if module.training and not torch.compiler.is_compiling():  # Dynamo has no weak references
            mean = getattr(module, "running_mean", None)
            if mean is not None:
                earlier = _UPDATES.get(id(mean))
                if earlier is not None:
                    settle(earlier)
                _UPDATES[id(mean)] = self
        return self

    def normalised(self) -> bool:
        """True if a residual can still be added."""
        return self.value is None and self.bn is not None and self.residual is None and self.act is None

    def activate(self, act: nn.Module) -> Lazy:
        """With an activation.  In inference a convolution's is not computed before it is known what follows."""
        if (
            self.conv is None
            or self.bn is None
            or self.residual is not None
            or torch.is_grad_enabled()
            or type(peek(self.input)) is Symbol
            or torch.compiler.is_compiling()
        ):
            return self.evaluate(act)
        self.act = act
        return self

    def pooled(self, pool: nn.MaxPool2d) -> Lazy | None:
        """Compute it with max pooling behind it; None, and nothing has happened, where that is not one call."""
        pooling = pooling_of(pool, self)
        if pooling is None:
            return None
        self.detach()
        input, channels_last = peek(self.input), self.channels_last
        value = fused_call.own_conv_bn_act(
            self.conv, self.bn, input, None, self.act, channels_last=channels_last, pooling=pooling
        )
        return None if value is None else Lazy.of(value, OWN)

    def followed_by(self, conv: Any, channels_last: bool) -> Lazy:
        """A convolution of what this one, which has an activation, computes; one call may compute them all."""
        lazy = Lazy(conv, None, self.input, channels_last)
        lazy.before = (*self.before, self)
        return lazy

    def detach(self) -> None:
        """Compute the convolutions before this one."""
        if self.before:
            self.input, self.before = settle(self.before[-1]), ()

    def _fused(self, act: nn.Module | None) -> Tensor | None:
        """In one call with the convolutions before it; None, and nothing has happened, where it is none."""
        input = peek(self.input)
        if self.conv is None or self.bn is None or type(input) is Symbol:
            return None
        for link in self.before:
            if link.value is not None:  # computed since, for `guard`
                return None
        consume = self.consume and self.residual.held == OWN
        return fused_call.own_conv_bn_act(
            self.conv, self.bn, input, peek(self.residual), act, consume, self.pad > 0, self.channels_last,
            before=self.before,
        )  # fmt: skip

    def evaluate(self, act: nn.Module | None = None) -> Lazy:
        """Compute it, with an activation (None: its own)."""
        act = self.act if act is None else act
        value = self._fused(act)
        if value is None and self.before:
            self.detach()
            value = self._fused(act)
        conv, bn, source, residual = self.conv, self.bn, self.input, peek(self.residual)
        input = peek(source)
        self.input, self.residual, self.before = None, None, ()
        if type(input) is Symbol:
            self.value, self.held = input.tracer.record(self, input, residual, act), OWN
            return self
        self.held = OWN
        if value is None:
            if type(source) is Lazy:
                source.held = SHARED  # modules are called with it
            value = self._call(conv, bn, input, residual, act)
        if self.pad and residual is not None and value.shape[1] != residual.shape[1] + self.pad:
            raise RuntimeError(
                f"residual: expected {value.shape[1]} channels, got {residual.shape[1]} and {self.pad} of zeros"
            )
        self.value = value
        return self

    def _call(self, conv: Any, bn: Any, input: Tensor, residual: Tensor | None, act: nn.Module | None) -> Tensor:
        """Compute it part by part; a sum behind a batch norm is one with the norm."""
        self.held = SHARED
        if conv is not None:
            if bn is None and plain_convolution(conv) and not global_hooks():
                self.held = OWN
            input = conv(input)
        if bn is not None:
            return fused_call.bn_act(bn, input, residual, act, self.in_place, self.pad > 0)
        if residual is None:
            return F.pad(input, (0, 0, 0, 0, 0, self.pad)) if self.pad else input
        if self.pad:
            input[:, : residual.shape[1]].add_(residual)  # no assignment, which torch.fx could not record
            return input if act is None else act(input)
        return fused_call.add_act(input, residual, act, self.in_place)


def zero_padded(input: Any, channels: int) -> Any:
    """The input with so many channels of zeros behind its own, which a fused call adds without making them."""
    if not _is_tensor(input):
        return F.pad(input, (0, 0, 0, 0, 0, channels))
    lazy = Lazy(None, None, input)
    lazy.pad = channels
    return lazy


def peek(x: Any) -> Any:
    """The value of an evaluated `Lazy`, for code that only reads it; anything else itself."""
    return x.value if type(x) is Lazy else x


def settle(x: Any) -> Any:
    """An evaluated `Lazy`, so that several variables can hold it; anything else itself."""
    return x.evaluate() if type(x) is Lazy and x.value is None else x


def force(x: Any) -> Any:
    """What a `Lazy` stands for, for anybody; anything else itself."""
    if type(x) is not Lazy:
        return x
    if x.value is None:
        x.evaluate()
    x.held = SHARED
    return x.value


def force_all(xs: tuple[Any, ...]) -> tuple[Any, ...]:
    """`force` of each."""
    return tuple(map(force, xs))


def guard(x: Any, *pending: Any) -> Any:
    """`x`, which is about to be given to code that may write to it; what still has to read it is evaluated."""
    value = peek(x)
    if _is_tensor(value):
        for lazy in pending:
            if type(lazy) is Lazy and lazy.value is None:
                input, residual = peek(lazy.input), peek(lazy.residual)
                if residual is not None and _share_memory(value, residual):
                    lazy.evaluate()
                elif input is not None and _share_memory(value, input):
                    lazy.detach() if lazy.before else lazy.evaluate()
    return x


def _share_memory(one: Any, other: Any) -> bool:
    if one is other or type(one) is Symbol or type(other) is Symbol or torch.compiler.is_compiling():
        return one is other
    try:
        return share_storage(one, other)
    except (NotImplementedError, RuntimeError):  # as within torch.vmap
        return True


def call(f: Any, x: Any, last: bool = False, channels_last: bool = False) -> Any:
    """`f(x)`, or what will be.

    Args:
        f: a module, function or method.
        x: its argument; a pending `Lazy` is given up by the caller.
        last: the caller does not read `x` afterwards.
        channels_last: a convolution takes its input, and so gives its output, in channels_last memory.
    """
    role = _ROLES.get(type(f))
    if type(x) is Lazy:
        if x.value is None and x.act is not None:
            if role is _CONVOLUTION and len(x.before) < _MOST_BEFORE and fused_call.chains(peek(x.input)):
                return x.followed_by(f, channels_last)
            result = x.pooled(f) if role is _POOL else None
            if result is not None:
                return result
            x.evaluate()
        if x.value is None:
            if role is _RELU:
                if (x.bn is not None or x.residual is not None) and unobserved(f):
                    return x.activate(f)
            elif role is _IDENTITY:
                if unobserved(f):
                    return x
            elif x.conv is not None and x.bn is None:
                norm = f if role is _NORM else _norm(f)
                if norm is not None:
                    return x.normalise(norm)
            if is_known(f) and f in _RELUS and (x.bn is not None or x.residual is not None):
                return x.activate(RELU)
    elif not _is_tensor(x):
        lazy = lazily(f) if type(x) is list and x and _is_tensor(x[0]) else None  # as in a DenseNet
        return f(x) if lazy is None else lazy(receiver(f), x)
    if role is _CONVOLUTION or role is _NORM:
        if type(x) is Lazy and x.value is None:
            x.evaluate()
        return Lazy(f, None, x, channels_last) if role is _CONVOLUTION else Lazy(None, None, x).normalise(f)
    if role is None:
        conv = _convolution(f)
        norm = None if conv is not None else _norm(f)
        if conv is not None or norm is not None:
            pending = Lazy(conv, None, settle(x), channels_last and conv is not None)
            return pending if norm is None else pending.normalise(norm)
    lazy = lazily(f)
    if lazy is not None:
        held, value = SHARED, None
        result = lazy(receiver(f), x if last else force(x))
    else:
        held = settle(x).held if last and type(x) is Lazy else SHARED
        value = force(x)
        is_leaf = type(value) is Symbol and isinstance(f, nn.Module)
        result = value.tracer.leaf(f, value) if is_leaf else pooled(f, value)
    if not isinstance(f, nn.Module) or type(result) not in (Tensor, Symbol):
        return result
    if result is value:  # as from a dropout in inference
        return result if held == SHARED or not _unshared(result, 2) else Lazy.of(result, UNSHARED)
    return Lazy.of(result, UNSHARED) if _unshared(result) else result


def _unshared(tensor: Any, others: int = 0) -> bool:
    """True if nobody in Python holds a tensor but a variable of the caller, and so many others of its own."""
    if type(tensor) is Symbol:
        return True
    return not torch.compiler.is_compiling() and tensor._base is None and sys.getrefcount(tensor) <= _ALONE + others


def _count_alone(tensor: Any) -> int:
    # As in `_unshared`: how many references a call makes differs between releases of Python.
    return 0 if type(tensor) is Symbol else sys.getrefcount(tensor)


def _count_of_a_variable() -> int:
    variable = object()
    return _count_alone(variable)


_ALONE = _count_of_a_variable()


def invoke(channels_last: bool, f: Any, *args: Any, **options: Any) -> Any:
    """`f(*args, **options)`, or what will be; `channels_last` as for `call`."""
    if type(f) in _ROLES and not args and tuple(options) == ("input",):
        return call(f, options["input"], channels_last=channels_last)
    known = _FUNCTIONS[f] if is_known(f) else None
    owner = receiver(f)
    if owner is not f and type(owner).__name__ == "FloatFunctional" and _is_identity(owner.activation_post_process):
        known = _FLOAT_FUNCTIONAL.get(f.__name__)
    if known is not None:
        result = known(*args, **options)
        if result is not None:
            if type(result) is Lazy and result.value is None and f is F.conv2d:
                result.channels_last = channels_last
            return result
    args = force_all(args)
    options = {name: force(argument) for name, argument in options.items()}
    lazy = lazily(f)
    return f(*args, **options) if lazy is None else lazy(receiver(f), *args, **options)


def method(name: str, x: Any, *args: Any, **options: Any) -> Any:
    """`x.name(*args, **options)`, or what will be."""
    if type(x) is Lazy or _is_tensor(x):
        known = TENSOR_METHODS.get(name)
        result = None if known is None else known(x, *args, **options)
        if result is not None:
            return result
    return invoke(False, getattr(force(x), name), *args, **options)


def attribute(name: str, x: Any) -> Any:
    """`x.name`, which is one of `ATTRIBUTES`."""
    if type(x) is not Lazy:
        return getattr(x, name)
    if x.value is None and name in ("ndim", "device", "is_cuda"):
        return getattr(peek(x.input), name)
    return getattr(settle(x).value, name)


def add(a: Any, b: Any, last: bool = False) -> Any:
    """`a + b`, or what will be; `last`: the caller does not read `b` afterwards."""
    if type(a) is Lazy and a.normalised():
        return _attach(a, b, False, last)
    if type(b) is Lazy and b.normalised():
        return _attach(b, a, False, False)
    # The output of a convolution that nobody else has seen takes the sum.
    fresh = type(a) is Lazy and a.value is None and a.conv is not None and a.evaluate().held == OWN
    if fresh and _is_padded(b) and a.value.dtype is b.input.dtype and a.value.shape[1] == b.input.shape[1] + b.pad:
        total = Lazy(None, None, a.value)
        total.residual, total.pad = b.input, b.pad
        return total
    second = force(b)
    fresh = fresh and _alike(a.value, second)
    first = a.value if fresh else force(a)
    if not _is_tensor(first) or not _is_tensor(second):
        return first + second
    total = Lazy(None, None, first)
    total.residual, total.in_place = second, fresh
    return total


def add_(a: Any, b: Any, last: bool = False) -> Any:
    """`a += b`, or what will be; `last`: the caller does not read `b` afterwards."""
    if type(a) is Lazy:
        if a.normalised():
            return _attach(a, b, True, last)
        a = settle(a)
        if a.held != SHARED:
            second = force(b)
            if _is_tensor(second):
                total = Lazy(None, None, a.value)
                total.residual, total.in_place = second, True
                return total
    value = force(a)
    value += force(b)
    return value


def _attach(lazy: Lazy, residual: Any, in_place: bool, last: bool) -> Lazy:
    """`lazy`, a batch norm, with a residual."""
    if type(residual) is Lazy:
        if residual.value is None:
            if _is_padded(residual):
                lazy.residual, lazy.pad, lazy.in_place = residual.input, residual.pad, in_place
                return lazy
            residual.evaluate()
        lazy.consume = last
    elif not _is_tensor(residual):
        value = force(lazy)
        if in_place:
            value += residual
        else:
            value = value + residual
        return value
    lazy.residual, lazy.in_place = residual, in_place
    return lazy


def _is_padded(x: Any) -> bool:
    return type(x) is Lazy and x.value is None and x.pad > 0 and x.residual is None and x.bn is None


def _alike(one: Any, other: Any) -> bool:
    if type(one) is Symbol or type(other) is Symbol:
        return type(one) is type(other)
    if not _is_tensor(other) or fused_call.must_decompose(one):
        return False
    return one.dtype is other.dtype and one.shape == other.shape


_NO_METHODS: dict[Any, Callable[..., Any]] = {}


def lazily(f: Any) -> Callable[..., Any] | None:
    """What to call with `receiver(f)` in place of a module or method; None if that must be called itself."""
    if type(f) is MethodType:
        return getattr(type(f.__self__), "_resfuse_methods", _NO_METHODS).get(f.__func__)
    if not isinstance(f, nn.Module):
        return None
    lazy = FORWARDS.get(getattr(type(f), "forward", None))
    if lazy is None or not unobserved(f) or global_hooks() or f._compiled_call_impl is not None:
        return None
    if type(f).__call__ is not nn.Module.__call__ or torch._C._get_tracing_state() is not None:
        return None
    return lazy


def receiver(f: Any) -> Any:
    """The module whose method `f` is, or which it is itself."""
    return f.__self__ if type(f) is MethodType else f


def evaluated(lazy: Callable[..., Any]) -> Callable[..., Any]:
    """A forward from one that may return a `Lazy`, which fused callers then use instead."""

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return force(lazy(self, *args, **options))

    forward.__doc__, forward.__wrapped__ = lazy.__doc__, lazy  # type: ignore[attr-defined]
    FORWARDS[forward] = lazy
    return forward


def _is_identity(module: Any) -> bool:
    return activation_of(module) == "identity"


def is_known(f: Any) -> bool:
    """True for a function that `call` and `invoke` may make part of a fused call."""
    # Modules have no place there, and Dynamo (torch 2.14) cannot look them up.
    return not isinstance(f, nn.Module) and callable(f) and f.__hash__ is not None and f in _FUNCTIONS


def _convolution(f: Any) -> Any:
    """The convolution that calling `f` computes; None if it is none, or a class of its own."""
    if type(f) is nn.Conv2d:
        return f
    if type(f) is MethodType and f.__func__ is nn.Conv2d.forward:
        return ConvCall.of(receiver(f))  # super().forward
    return None


def _norm(f: Any) -> Any:
    """The batch norm that calling `f` computes, or None."""
    if batch_norm_kind(f) is not None:
        return f
    if type(f) is NormCall:
        return f
    if type(f) is MethodType and f.__func__ in _NORM_FORWARDS:
        return NormCall(f.__self__, _NORM_FORWARDS[f.__func__])
    return None


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    weight, bias = force(weight), force(bias)
    if not _is_tensor(peek(settle(input))) or not _is_tensor(weight):
        return None
    return Lazy(ConvCall(weight, bias, stride, padding, dilation, groups), None, input)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    norm = BatchNorm(
        force(running_mean), force(running_var), force(weight), force(bias), training, momentum, eps
    )  # fmt: skip
    if type(input) is Lazy and input.value is None and input.conv is not None and input.bn is None:
        return input.normalise(norm)
    input = settle(input)
    return Lazy(None, None, input).normalise(norm) if _is_tensor(peek(input)) else None


def _relu(input: Any, inplace: bool = False) -> Any:
    return call(F.relu, input) if type(input) is Lazy and input.value is None else None


def _clamp(input: Any, min: Any = None, max: Any = None, **others: Any) -> Any:
    return _relu(input) if type(min) in (int, float) and min == 0 and max is None and not others else None


def _plain(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """For two positional arguments alone: without an `alpha`, which stands before or behind, or an `out`."""
    return lambda *args, **options: function(*args) if len(args) == 2 and not options else None


_MOST_BEFORE = 3
"""Longer chains than a block's hold back too much for too little."""
_CONVOLUTION, _NORM, _RELU, _IDENTITY, _POOL = range(5)
# Exactly these classes.
_ROLES = {
    nn.Conv2d: _CONVOLUTION, nn.BatchNorm2d: _NORM, nn.SyncBatchNorm: _NORM, nn.ReLU: _RELU, nn.Identity: _IDENTITY,
    nn.MaxPool2d: _POOL,
}  # fmt: skip
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
ATTRIBUTES = ("ndim", "device", "is_cuda", "shape", "dtype", "requires_grad")
TENSOR_METHODS: dict[str, Callable[..., Any]] = {
    "relu": _relu, "relu_": _relu, "clamp": _clamp, "clamp_": _clamp,
    "clamp_min": _clamp, "clamp_min_": _clamp, "add": _plain(add), "add_": _plain(add_),
}  # fmt: skip
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_RELUS, _relu),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_min_), _clamp),
    torch.add: _plain(add),
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.max_pool2d: lambda input, *args, **options: pooled(F.max_pool2d, force(input), *args, **options),
}
_FLOAT_FUNCTIONAL = {"add": _plain(add), "add_relu": _plain(lambda a, b: call(F.relu, add(a, b)))}
_NORM_FORWARDS = {
    nn.BatchNorm2d.forward: BatchNormKind(),
    nn.SyncBatchNorm.forward: BatchNormKind(synchronised=True),
}
