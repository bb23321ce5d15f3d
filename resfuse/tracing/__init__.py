"""The operator calls of a model as a list: shapes and options, no data.

A copy of the model without memory runs once under `torch.export`, on fake tensors; the graph that comes out has the
operators of resfuse and of ATen, the shapes, and the names of the modules.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resfuse.costs import Operation
from resfuse.nn.fused_call import traced_as_pytorch
from resfuse.tracing.calls import Call, calls_in
from resfuse.tracing.copies import Copy, Input, copy_without_data, fake_inputs, make_fake_

__all__ = ["Call", "Input", "Tracer", "operations"]


def operations(model: nn.Module, *inputs: Input) -> tuple[Operation, ...]:
    """The operator calls that a model makes for such inputs, in order, fused or not as the model is.

    Nothing is computed and no memory is taken for weights or activations; the model is not changed.  Views and other
    operators that move no data are in the list, too.  Under `torch.autocast` there are its casts.

    Args:
        model: in `train()` or `eval()`, on any device, the meta device too.
        inputs: tensors, or shapes; a shape stands for a tensor of the device and dtype of the model's parameters.

    Raises:
        TypeError: an input is neither a tensor nor a shape.
        ValueError: `torch.export` can not trace the model, which it can not where the program depends on values; the
            message has its reason.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> [(operation.path, operation.name) for operation in operations(layers, (2, 3, 16, 16))]
        [('0', 'conv2d'), ('1', 'batch_norm'), ('2', 'relu')]
    """
    return tuple(call.operation for call in Tracer(model, inputs).calls())


class Tracer:
    """A copy of a model, which can be changed (fused, say) before its calls are traced."""

    def __init__(self, model: nn.Module, inputs: tuple[Input, ...]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._mode = FakeTensorMode()
        with torch.inference_mode(False):
            self.inputs = fake_inputs(inputs, model, self._mode)
            """Fake tensors."""
            self._copy: Copy = copy_without_data(model)
        cls = type(self._copy.model)
        self.name = str(getattr(cls, "_resfuse_original", cls).__name__)
        """The model's class, before it was fused."""
        self._is_fake = False

    @property
    def model(self) -> nn.Module:
        """The copy, on the meta device until calls are traced."""
        return self._copy.model

    def calls(self, *, as_pytorch: bool = False) -> tuple[Call, ...]:
        """The operator calls.

        Args:
            as_pytorch: PyTorch's own, as if nothing were fused.

        Raises:
            ValueError: see `operations`.
        """
        with torch.inference_mode(False), torch.enable_grad():
            if not self._is_fake:
                make_fake_(self._copy, self._mode)
                self._is_fake = True
            if not as_pytorch:
                return self._traced()
            with traced_as_pytorch():
                return self._traced()

    def _traced(self) -> tuple[Call, ...]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about how models may be exported, which nobody does here
                program = torch.export.export(self.model, self.inputs, strict=False)
        except Exception as error:
            shapes = ", ".join(str(tuple(input.shape)) for input in self.inputs)
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"model: {self.name} can not be traced for inputs of shape {shapes}: {reason}") from error
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        flags = {place: parameters[name].requires_grad for place, name in signature.inputs_to_parameters.items()}
        for place, input in zip(signature.user_inputs, self.inputs, strict=False):
            flags[str(place)] = input.requires_grad
        return tuple(calls_in(program.graph_module, names, flags))
