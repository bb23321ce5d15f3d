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
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resfuse.backends import dispatch
from resfuse.nn.fused_call import traced_as_pytorch
from resfuse.roofline import is_view, named_arguments

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
        if not inputs:
            raise ValueError("inputs: expected at least one tensor or shape, got none")
        self._mode = FakeTensorMode()
        like: Tensor = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))
        self._device = torch.device("cpu") if like.is_meta else like.device
        with torch.inference_mode(False):
            self.inputs = [self._fake(_as_tensor(*numbered, like.dtype)) for numbered in enumerate(inputs)]
            self.inputs = [_channels_last(input) for input in self.inputs]
            self.model = _copy_on_meta(_unwrapped(model)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        with torch.inference_mode(False):
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
                if backward and roots and leaves:
                    with recorder:
                        torch.autograd.grad(roots, leaves, gradients, allow_unused=True)
        except Exception as error:
            shapes = ", ".join(str(tuple(input.shape)) for input in self.inputs)
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"model: {self.name} cannot be traced for inputs of shape {shapes}: {reason}") from error
        return recorder.calls

    def _make_fake(self) -> None:
        """Fake tensors in place of those on the meta device, which fusing needs."""
        fakes: dict[int, Tensor] = {}
        for module in self.model.modules():
            for owner in _owners(module):
                for name, tensor in owner.items():
                    if isinstance(tensor, Tensor) and not hasattr(tensor, "fake_mode"):
                        owner[name] = fakes.setdefault(id(tensor), self._fake(tensor))

    def _fake(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return _empty(tensor, self._device)


def _channels_last(input: Tensor) -> Tensor:
    """In the memory format in which fused models compute, and eager ones are fastest."""
    return input.to(memory_format=torch.channels_last) if input.dim() == 4 else input


def with_recomputation(calls: list[Call]) -> list[Call]:
    """The calls of a training step after `fuse_(recompute=True)`: backward makes activations again.

    Those that a fused call reads, or whose sign masks a ReLU behind a residual; each once, though of a stage of more
    than four blocks some come back twice.
    """
    kernel = torch.ops.resfuse.bn_apply.default
    named = [(call, run, named_arguments(run.func, run.args, run.kwargs)) for call in calls for run in call.forward]
    fused = [(call, run, given) for call, run, given in named if run.func.namespace == "resfuse"]
    read = {
        _memory(given[name]) for *_, given in fused for name in ("input", "residual") if given.get(name) is not None
    }
    for call, run, given in fused:
        if not run.func._overloadpacket.__name__.endswith("bn_act_train"):
            continue
        output, *z, mean, invstd = run.output
        residual, relu = given["residual"], given["relu"]
        if _memory(output) in read or (residual is not None and relu):
            arguments = (*(z or [given["input"]]), mean, invstd, given["weight"], given["bias"], residual, relu)
            call.backward.insert(0, Run(kernel, arguments, {}, output))
    return calls


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


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

        with mock.patch.object(nn.Module, "__call__", followed):
            yield

    def _record(self, run: Run) -> None:
        node: Any = torch._C._current_autograd_node()
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
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
        yield


def _as_tensor(number: int, input: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(input, Tensor):
        return input
    if isinstance(input, str) or not isinstance(input, Sequence) or not all(type(size) is int for size in input):
        raise TypeError(f"inputs[{number}]: expected a tensor or a shape of integers, got {input!r}")
    if any(size < 1 for size in input):
        raise ValueError(f"inputs[{number}]: expected sizes of at least 1, got {tuple(input)}")
    return torch.empty(tuple(input), dtype=dtype, device="meta")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_orig_mod", model._modules.get("_orig_mod")), nn.Module):
            model = inner
        else:
            return model


def _copy_on_meta(model: nn.Module) -> nn.Module:
    """A copy without memory.  Hooks still keep its modules from being fused, but do nothing."""
    memo: dict[int, Any] = {}
    try:
        for module in model.modules():
            memo |= {id(hook): _do_nothing for name in _HOOKS for hook in getattr(module, name).values()}
            tensors = (value for owner in _owners(module) for value in owner.values() if isinstance(value, Tensor))
            memo |= {id(tensor): _empty(tensor, torch.device("meta")) for tensor in tensors}
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"model: {type(model).__name__} cannot be copied: {error}") from error
    for module in copied.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = 0.1  # the average would need a counter's value, and costs the same
    return copied


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, tensor.requires_grad) if parameter else empty.requires_grad_(tensor.requires_grad)


def _owners(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Parameters, buffers and plain attributes, by name."""
    return module._parameters, module._buffers, vars(module)


def _do_nothing(*_: Any, **__: Any) -> None:
    """In place of a hook."""
