"""Synchronised batch norm as an operator, held against batch norm over the batch of all processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import resfuse.nn as rnn
from resfuse.functional import sync_bn_act
from resfuse.layout import empty_result
from tests import contract, models
from tests.distributed.scenario import (
    assert_equal_everywhere,
    gathered,
    rank,
    recorded_traffic,
    scenario,
    share,
    summed,
    to_sync,
)
from tests.shapes import bn_act_call


def assert_operator_keeps_the_contract(call: contract.Call, sizes: tuple[int, int]) -> None:
    """Both processes together against eager batch norm of the whole batch, in the same dtype and in float64."""
    grad_output = contract.random_grad_output(call, torch.Generator().manual_seed(1))
    own = call.map(lambda tensor: share(tensor, sizes) if tensor.dim() == 4 else tensor)
    sync_options = {name: value for name, value in call.options.items() if name != "training"}
    functions: contract.Functions = {"bn_act": sync_bn_act}
    own = contract.dataclasses.replace(own, options=sync_options)
    parts, again = (contract.results(functions, own, share(grad_output, sizes)) for _ in range(2))
    assert all(torch.equal(part, again[name]) for name, part in parts.items()), "not the same bits twice"
    assert parts["output"].stride() == empty_result(own.input).stride()
    found = {}
    for name, part in parts.items():
        if name in contract.RUNNING:
            assert_equal_everywhere(part)
            found[name] = part
        else:
            found[name] = (gathered if part.dim() == 4 else summed)(part)
    eager = contract.results(contract.EAGER, call, grad_output)
    truth = contract.results(contract.EAGER, call.truth(), grad_output.double())
    assert found.keys() == truth.keys()
    contract.assert_within_contract(found, eager, truth, call.input.dtype, contract.term_sizes(call, grad_output))


@scenario
def operator_keeps_the_contract() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        for layout in ("nchw", "nhwc"):
            for activation in ("relu", "identity"):
                call = bn_act_call(
                    (5, 13, 6, 7), dtype, layout=layout, residual_layout=layout, activation=activation, training=True
                )
                assert_operator_keeps_the_contract(call, (2, 3))


@scenario
def operator_without_parameters_residual_or_statistics() -> None:
    for affine in (True, False):
        call = bn_act_call((5, 6, 4, 3), residual_layout=None, affine=affine, training=True, momentum=0.3, eps=1e-3)
        assert_operator_keeps_the_contract(call, (4, 1))
        assert_operator_keeps_the_contract(call.replace(running_mean=None, running_var=None), (1, 4))


@scenario
def operator_on_odd_parts_of_a_batch() -> None:
    """An empty one, one value per channel on each process, a large mean, parameters as after `model.bfloat16()`."""
    for dtype in (torch.float32, torch.bfloat16):
        call = bn_act_call((5, 6, 4, 3), dtype, parameter_dtype=dtype, training=True)
        for sizes in ((0, 5), (5, 0)):
            assert_operator_keeps_the_contract(call, sizes)
    assert_operator_keeps_the_contract(bn_act_call((2, 10, 1, 1), training=True), (1, 1))
    assert_operator_keeps_the_contract(bn_act_call((5, 13, 6, 7), mean=300.0, training=True), (2, 3))


@scenario
def operator_with_images_of_unequal_sizes() -> None:
    """Each process has its own N, H and W: each value counts the same, as in one batch of all of them."""
    values = models.random_input((1, 7, 1, 50)).double()
    own, shape = values.split((12, 38), 3)[rank()], ((1, 7, 3, 4), (1, 7, 2, 19))[rank()]
    mean, var = torch.zeros(7).double(), torch.ones(7).double()
    output = sync_bn_act(own.reshape(shape), mean, var, activation="identity")
    expected = nn.functional.batch_norm(values, None, None, training=True)
    torch.testing.assert_close(output.reshape(own.shape), expected.split((12, 38), 3)[rank()])
    torch.testing.assert_close(mean, 0.1 * values.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.9 + 0.1 * values.var((0, 2, 3)))


@scenario
def operator_refuses_bad_arguments_before_it_communicates() -> None:
    input, vector = torch.zeros(2, 3, 4, 4), torch.ones(3)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"input": input[0]}, ValueError, "input: expected 4 dimensions"),
        ({"activation": "gelu"}, ValueError, "activation: expected"),
        ({"residual": input[:, :2]}, ValueError, "residual: expected shape"),
        ({"running_mean": None}, ValueError, "running_mean: expected a tensor"),
        ({"input": input.int()}, TypeError, "input: expected a floating-point"),
    ]
    with recorded_traffic() as traffic:
        for change, error, message in bad:
            arguments = {"input": input, "running_mean": vector, "running_var": vector, **change}
            with pytest.raises(error, match=message):
                sync_bn_act(**arguments)
    assert traffic == []
    assert torch.equal(vector, torch.ones(3))


@scenario
def equals_torch_sync_batchnorm_on_gpus() -> None:
    """torch.nn.SyncBatchNorm itself, which runs on GPUs only, against the operator, both held to float64."""
    device = f"cuda:{rank() % torch.cuda.device_count()}"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("nchw", "nhwc"):
            call = bn_act_call((5, 13, 6, 7), dtype, layout=layout, residual_layout=None, training=True)
            call = call.with_options(activation="identity")
            grad_output = contract.random_grad_output(call, torch.Generator().manual_seed(1))
            torch_bn = nn.SyncBatchNorm(13).to(device)
            names = ("weight", "bias", *contract.RUNNING)
            torch_bn.load_state_dict({name: call.tensors[name] for name in names}, strict=False)
            own_bn = to_sync(rnn.BNAct2d(13, activation="identity")).to(device)
            own_bn.load_state_dict(torch_bn.state_dict())
            results = []
            for bn in (own_bn, torch_bn):
                own = share(call.input).to(device).requires_grad_()
                output = bn(own)
                output.backward(share(grad_output).to(output))
                found = {"output": gathered(output.cpu()), "grad_input": gathered(own.grad.cpu())}  # type: ignore[union-attr]
                found |= {f"grad_{name}": summed(p.grad.cpu()) for name, p in bn.named_parameters()}  # type: ignore[union-attr]
                results.append(found | {name: getattr(bn, name).cpu() for name in contract.RUNNING})
            truth = contract.results(contract.EAGER, call.truth(), grad_output.double())
            terms = contract.term_sizes(call, grad_output)
            contract.assert_within_contract(results[0], results[1], truth, dtype, terms)
