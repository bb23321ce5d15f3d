"""The operator calls of a model, forward and backward, recorded on fake tensors: shapes and strides, no data.

A copy of the model without memory runs once under a `TorchDispatchMode`.  A fused model then calls the registered
operators of resfuse, as it does under `torch.compile`, so that the mode sees them and those of ATen alike.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resfuse.backends import dispatch
from resfuse.nn.fused_call import traced_as_pytorch
from resfuse.roofline import is_view

Input = Tensor | Sequence[int]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Run(NamedTuple):
    """One operator call; tensors are fake."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclasses.dataclass
class Call:
    """An operator call of forward, with those that compute its gradients."""

    path: str
    """The module it belongs to, as in `model.named_modules()`."""
    forward: list[Run]
    """One, or none for what backward does on its own account."""
    backward: list[Run]


class Tracer:
    """A copy of a model on the meta device, which can be changed (fused, say) before its calls are recorded.

    Args:
        model: in `train()` or `eval()`, on any device, the meta device too.
        inputs: tensors, or shapes; a shape stands for a tensor of the device and dtype of the model's parameters.

    Raises:
        TypeError: `model` is no module, or an input neither a tensor nor a shape.
        ValueError: the model cannot be copied, or a shape has a size below one.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Input]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._mode = FakeTensorMode()
        self._devices: dict[int, torch.device] = {}  # where the tensor of the model was that a meta tensor stands for
        with torch.inference_mode(False):
            self.inputs = self._fake_inputs(inputs, model)
            self.model = self._copy(_unwrapped(model))
        cls = type(self.model)
        self.name: str = getattr(cls, "_resfuse_original", cls).__name__
        """The model's class, before it was fused."""

    def calls(self, *, backward: bool, as_pytorch: bool = False) -> list[Call]:
        """Run the model once and list its operator calls.

        Args:
            backward: those of the gradients of all parameters and inputs that require one, too.
            as_pytorch: PyTorch's own operators, as if nothing were fused.

        Raises:
            ValueError: the model cannot be traced, for example because its program depends on values.
        """
        self._make_fake()
        recorder = _Recorder(self.model)
        leaves = [tensor for tensor in (*self.model.parameters(), *self.inputs) if tensor.requires_grad]
        unfused = traced_as_pytorch() if as_pytorch else nullcontext()
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(backward), _as_if_compiling(), unfused, self._mode:
                with recorder, recorder.module_names():
                    outputs = self.model(*self.inputs)
                roots = [found for found in tree_leaves(outputs) if isinstance(found, Tensor) and found.requires_grad]
                gradients = [torch.ones_like(root) for root in roots]
                if roots and leaves:
                    with recorder:
                        torch.autograd.grad(roots, leaves, gradients, allow_unused=True)
        except Exception as error:
            shapes = ", ".join(str(tuple(input.shape)) for input in self.inputs)
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"model: {self.name} cannot be traced for inputs of shape {shapes}: {reason}") from error
        return recorder.calls

    def _fake_inputs(self, inputs: Sequence[Input], model: nn.Module) -> list[Tensor]:
        if not inputs:
            raise ValueError("inputs: expected at least one tensor or shape, got none")
        like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))
        tensors = []
        for number, input in enumerate(inputs):
            if not isinstance(input, Tensor):
                input = torch.empty(_checked_shape(number, input), dtype=like.dtype, device="meta")
                self._devices[id(input)] = _place(like)
            tensors.append(input)
        return [self._fake(tensor) for tensor in tensors]

    def _copy(self, model: nn.Module) -> nn.Module:
        """Hooks still keep a module of the copy from being fused, but do nothing."""
        memo: dict[int, Any] = {id(hook): _do_nothing for hooks in _hooks_of(model) for hook in hooks.values()}
        try:
            for tensor in _tensors_of(model):
                empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, tensor.requires_grad)
                memo[id(tensor)] = empty
                self._devices[id(empty)] = _place(tensor)
            copied = copy.deepcopy(model, memo)
        except Exception as error:
            raise ValueError(f"model: {type(model).__name__} cannot be copied: {error}") from error
        for hooks in _hooks_of(copied):
            hooks.update(dict.fromkeys(hooks, _do_nothing))
        for module in copied.modules():
            if isinstance(module, _BatchNorm) and module.momentum is None:
                module.momentum = 0.1  # the average would need a counter's value, and costs the same
        self._kept = list(memo.values())  # ids stay theirs
        return copied

    def _make_fake(self) -> None:
        """Fake tensors on the devices of the original, in place of those on the meta device."""
        fakes: dict[int, Tensor] = {}
        for module in self.model.modules():
            owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for owner in owners:
                for name, tensor in owner.items():
                    if isinstance(tensor, Tensor) and not hasattr(tensor, "fake_mode"):
                        if id(tensor) not in fakes:
                            fakes[id(tensor)] = self._fake(tensor)
                        owner[name] = fakes[id(tensor)]

    def _fake(self, tensor: Tensor) -> Tensor:
        device = self._devices.get(id(tensor), _place(tensor))
        with self._mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(fake, tensor.requires_grad)
            return fake.requires_grad_(tensor.requires_grad)


def expanded(run: Run) -> list[Run]:
    """The operators that the backend `reference` makes of one of resfuse's."""
    mode = next(leaf.fake_mode for leaf in tree_leaves(run.args) if hasattr(leaf, "fake_mode"))
    recorder = _Recorder(nn.Module())
    with torch.no_grad(), _as_if_compiling(), dispatch.use_backend("reference"), mode, recorder:
        run.func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *run.args, **run.kwargs)
    return [run for call in recorder.calls for run in call.forward]


class _Recorder(TorchDispatchMode):
    """Lists operator calls, those of backward with the forward's whose autograd node is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._model = model
        self._stack = [""]  # names of the modules whose forward is running
        self._by_node: dict[int, Call] = {}  # sequence number of an autograd node -> the call that made it
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._owners: dict[int, str] = {id(tensor): name.rpartition(".")[0] for name, tensor in reversed(tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks a tensor for its device
            return func(*args, **kwargs)
        with self:
            output = func.decompose(*args, **kwargs)
        if output is NotImplemented:
            output = func(*args, **kwargs)
            self._record(Run(func, args, kwargs, output))
        return output

    @contextmanager
    def module_names(self) -> Iterator[None]:
        """Follow the calls of modules: not by hooks, which would keep them from being fused."""
        names = {id(module): name for name, module in self._model.named_modules()}
        call: Callable[..., Any] = nn.Module.__call__

        def followed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._stack.append(names.get(id(module), self._stack[-1]))
            try:
                return call(module, *args, **kwargs)
            finally:
                self._stack.pop()

        nn.Module.__call__ = followed  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = call

    def _record(self, run: Run) -> None:
        node: Any = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None:
            call = self._by_node.get(node._sequence_nr())
            if call is None:
                call = Call("", [], [])
                self.calls.append(call)
            call.backward.append(run)
            return
        owner = next((self._owners[id(leaf)] for leaf in tree_leaves(run.args) if id(leaf) in self._owners), None)
        if owner is not None and isinstance(run.output, Tensor) and (is_view(run.func) or "_to_copy" in str(run.func)):
            self._owners[id(run.output)] = owner  # a view or a cast of a parameter
        call = Call(self._stack[-1] if owner is None else owner, [run], [])
        self.calls.append(call)
        self._by_node.setdefault(torch.autograd._get_sequence_nr() - 1, call)  # type: ignore[attr-defined]


@contextmanager
def _as_if_compiling() -> Iterator[None]:
    """Inside, resfuse's functions call their registered operators, which modes see, instead of the backends."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _checked_shape(number: int, shape: Any) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
        raise TypeError(f"inputs[{number}]: expected a tensor or a shape of integers, got {shape!r}")
    if any(size < 1 for size in shape):
        raise ValueError(f"inputs[{number}]: expected sizes of at least 1, got {tuple(shape)}")
    return tuple(shape)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_orig_mod", model._modules.get("_orig_mod")), nn.Module):
            model = inner
        else:
            return model


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    for module in model.modules():
        values = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        yield from (value for value in values if isinstance(value, Tensor))


def _hooks_of(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        yield from (getattr(module, name) for name in _HOOKS)


def _place(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _do_nothing(*_: Any, **__: Any) -> None:
    """In place of a hook."""
