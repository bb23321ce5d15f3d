"""Follows a fused forward with symbols in place of tensors, to learn what it will fuse.

Nothing depends on it but the report, and which modules get another class: what is fused is decided at each call.
Modules that are not fused are not entered.  Where a forward branches on a tensor, both branches are followed.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from resfuse.nn.fused_call import ConvCall, NormCall, reason_against
from resfuse.nn.lazy import RELU, Lazy, Symbol
from resfuse.types import BatchNorm

_PATHS = 16
"""Limit on the ways through one forward."""


class NotFollowedError(Exception):
    """The reason why a forward cannot be followed."""


class Op(NamedTuple):
    """One evaluation: modules (or a tensor of theirs, where a forward calls functions), and who made it."""

    conv: Any
    bn: Any
    add: bool
    activated: bool
    act: nn.Module | None
    """The ReLU, where it is a module."""
    callers: tuple[nn.Module, ...]
    """Whose forwards are running, the innermost first."""
    line: int
    reason: str | None
    """Why it is not a fused call; None if it is."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for the same modules."""
        if self.conv is None and self.bn is None:
            return id(self.callers[0]), self.line, id(self.act)
        return id(self.conv), id(self.bn)


def follow(module: nn.Module) -> tuple[list[Op], set[nn.Module]]:
    """The evaluations in the forward of a module of a fused class, of the path with most of each; and who makes them.

    Raises:
        NotFollowedError: no path through it can be followed.
    """
    found: dict[tuple[Any, ...], list[Op]] = {}
    failure: str | None = None
    entered: set[nn.Module] = set()
    completed, todo = 0, [[]]  # type: ignore[var-annotated]
    for _ in range(_PATHS):
        if not todo:
            break
        follower = _Follower(todo.pop())
        try:
            follower.run(module)
        except Exception as error:
            failure = failure or _describe(error, module)
        else:
            completed += 1
            entered |= follower.entered
            for key, ops in follower.ops.items():
                if len(ops) > len(found.get(key, ())):
                    found[key] = ops
        decisions, known = follower.decisions, len(follower.given)
        others = [[*decisions[:i], not decisions[i]] for i in range(known, len(decisions))]
        todo += others
    if not completed:
        raise NotFollowedError(failure)
    return [op for ops in found.values() for op in ops], entered


class _Follower(fx.Tracer):
    """Follows one path: the given decisions, then False wherever a truth value is asked for."""

    def __init__(self, given: list[bool]) -> None:
        super().__init__()
        self.graph = fx.Graph(tracer_cls=type(self))
        self.given, self.decisions = given, list[bool]()
        self.ops: dict[tuple[Any, ...], list[Op]] = {}
        self.origin: dict[fx.Node, Op] = {}
        self.convolutions: dict[fx.Node, nn.Conv2d] = {}
        self.entered: set[nn.Module] = set()

    def run(self, module: nn.Module) -> None:
        self.root = module
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        required = required or [p for p in parameters if p.kind is p.VAR_POSITIONAL]
        with torch.no_grad(), _ReadOnly():
            module.forward(*(self.symbol() for _ in required))

    def symbol(self) -> Symbol:
        return Symbol(self.graph.placeholder("tensor"), self)

    def create_proxy(self, *_: Any, **__: Any) -> Symbol:
        return self.symbol()

    def to_bool(self, obj: Any) -> bool:
        index = len(self.decisions)
        if index >= _PATHS:
            raise RuntimeError("it branches on tensors too often")
        self.decisions.append(self.given[index] if index < len(self.given) else False)
        return self.decisions[-1]

    def record(self, lazy: Lazy, input: Any, residual: Any, act: nn.Module | None) -> Symbol:
        """Called by `Lazy.evaluate`."""
        callers, line = _callers()
        self.entered.update(callers)
        conv, bn, add = lazy.conv, lazy.bn, residual is not None
        reason = None
        if bn is None and not (add and act is not None):
            reason = "no ReLU follows the addition" if add else "no batch norm follows"
        elif bn is not None and conv is None and not add and act is None:
            reason = "no convolution before it and no ReLU behind it"
        elif bn is not None:
            reason = reason_against(conv, bn)
        left = self.convolutions.get(input.node)
        if bn is not None and left is not None:  # it was called as it is
            self.note(left, reason_against(left, None))
            reason = reason if reason is None else reason_against(left, None)
        op = Op(
            _source(conv),
            _source(bn),
            add,
            act is not None,
            None if act is RELU else act,
            tuple(callers or [self.root]),
            line,
            reason,
        )
        self.ops.setdefault(op.key, []).append(op)
        result = self.symbol()
        if act is None:
            self.origin[result.node] = op
        return result

    def leaf(self, module: nn.Module, input: Any) -> Symbol:
        """Called where a module that is not entered would be."""
        op = self.origin.get(input.node)
        is_activation = type(module).__module__ == "torch.nn.modules.activation" and type(module) is not nn.ReLU
        if op is not None and op.bn is not None and is_activation:
            self.note(module, f"activation is {type(module).__name__}: applied after the fused conv + bn")
        result = self.symbol()
        if isinstance(module, nn.Conv2d):
            self.convolutions[result.node] = module
        return result

    def note(self, module: nn.Module, reason: str | None) -> None:
        """Something to say of a module that is called as it is."""
        op = Op(None, None, False, False, module, (module,), 0, reason)
        self.ops.setdefault(op.key, []).append(op)


class _ReadOnly(TorchFunctionMode):
    """Leaves real tensors, such as the count of batches, as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        writes = augmented or (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
        if writes and args and type(args[0]) is not Symbol:
            return args[0]
        return func(*args, **(kwargs or {}))


def _source(part: Any) -> Any:
    """The module of a convolution or norm, or a tensor that leads to it."""
    if isinstance(part, NormCall):
        return part.module
    if isinstance(part, (ConvCall, BatchNorm)):
        tensors = (part.weight, *part) if isinstance(part, BatchNorm) else (part.weight,)
        return next(
            (tensor for tensor in tensors if isinstance(tensor, Tensor) and not isinstance(tensor, fx.Proxy)), part
        )
    return part


def _callers() -> tuple[list[Any], int]:
    """The modules whose rewritten methods are running, the innermost first, and the line of that one."""
    callers, line = [], 0
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if any(name.startswith("_resfuse_") for name in code.co_freevars):
            callers.append(frame.f_locals[code.co_varnames[0]])
            line = line or frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return callers, line


def _describe(error: Exception, module: nn.Module) -> str:
    """The reason why a forward could not be followed."""
    file = inspect.getsourcefile(type(module).__mro__[2])
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" at line {lines[-1]}" if lines else ""
    said = str(error).partition("\n")[0]
    return f"its forward cannot be followed{where}: {type(error).__name__}: {said}"


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[Callable[[], None]]:
    """What the forwards that are followed inside do to attributes, random states and standard output is undone.

    Gives a function that undoes attributes at once.
    """
    states = [(module, module.__dict__, _state(module)) for module in model.modules()]

    def restore() -> None:
        for module, attributes, state in states:
            now = _state(module)
            if len(now) != len(state) or any(now.get(key, restore) is not value for key, value in state.items()):
                for container in (
                    attributes["_parameters"],
                    attributes["_buffers"],
                    attributes["_modules"],
                    attributes,
                ):
                    container.clear()
                for (owner, key), value in state.items():
                    (attributes if owner is None else attributes[owner])[key] = value

    python = random.getstate()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield restore
        finally:
            restore()
            random.setstate(python)


def _state(module: nn.Module) -> dict[tuple[str | None, str], Any]:
    found: dict[tuple[str | None, str], Any] = {(None, key): value for key, value in module.__dict__.items()}
    for owner in ("_parameters", "_buffers", "_modules"):
        found |= {(owner, key): value for key, value in module.__dict__[owner].items()}
    return found
