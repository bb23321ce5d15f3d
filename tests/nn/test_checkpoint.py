"""Networks that compute activations again in backward: the same results, and the repetition leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resfuse import models as zoo
from tests import models

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS: dict[str, Any] = {
    "resnet18": lambda **options: zoo.resnet18(width=4, num_classes=5, **options),
    "resnet50-A": lambda **options: zoo.resnet50(width=4, num_classes=5, shortcut="A", **options),
    "cifar-resnet20": lambda **options: zoo.cifar_resnet(20, width=4, **options),
    "cifar-preact29": lambda **options: zoo.cifar_preact_resnet(29, "bottleneck", width=4, **options),
}
INPUT = models.random_input((2, 3, 33, 33))


def pair(name: str, checkpoint: int) -> tuple[nn.Module, nn.Module]:
    plain = models.seeded(NETWORKS[name])
    checkpointed = NETWORKS[name](checkpoint=checkpoint)
    checkpointed.load_state_dict(plain.state_dict())
    return checkpointed.double(), plain.double()


@pytest.mark.parametrize("checkpoint", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_results(name: str, checkpoint: int) -> None:
    """Output, gradients, running statistics and their count of batches, in several steps."""
    checkpointed, plain = pair(name, checkpoint)
    for training in (True, False, True):
        models.assert_same(checkpointed.train(training), plain.train(training), INPUT)
    assert checkpointed.bn1.num_batches_tracked == 2
    assert checkpointed.layer2[0].bn2.num_batches_tracked == 2


@pytest.mark.parametrize("checkpoint", [0, 1, 3])
def test_backward_computes_the_stages_again(checkpoint: int) -> None:
    network = NETWORKS["cifar-resnet20"](checkpoint=checkpoint)
    stages = 6 * 3  # convolutions
    with models.counted_calls() as calls:
        output = network(INPUT)
        assert calls.conv_bn_act == 1 + stages
        output.sum().backward()
        assert calls.conv_bn_act == 1 + stages * (2 if checkpoint else 1)
    with models.counted_calls() as calls, torch.no_grad():
        network(INPUT)
    assert calls.conv_bn_act == 1 + stages


def test_activations_are_not_kept() -> None:
    """Nothing that the stages save for backward is left, except the blocks' inputs, which the graph holds."""

    def kept(checkpoint: int) -> int:
        network = NETWORKS["cifar-resnet20"](checkpoint=checkpoint)
        bytes_of: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            bytes_of[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(INPUT)
        output.sum().backward()
        return sum(bytes_of.values())

    assert kept(1) < kept(0) / 3  # the stem's, and the last layer's


def test_buffers_remain_the_same_objects() -> None:
    """Also where the repetition ends early, or fails."""
    network = NETWORKS["cifar-resnet20"](checkpoint=2)
    buffers = dict(network.named_buffers())
    output = network(INPUT)
    network.layer2[1].conv2.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        output.sum().backward()
    for name, buffer in network.named_buffers():
        assert buffer is buffers[name], name
    assert network.layer2[1].bn1.num_batches_tracked == 1


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")


def test_copies_keep_the_option() -> None:
    network = copy.deepcopy(NETWORKS["resnet18"](checkpoint=2))
    assert network.layer1.checkpoint == 2
    assert list(network.state_dict()) == list(NETWORKS["resnet18"]().state_dict())


@models.compiles
@pytest.mark.parametrize("name", ["cifar-preact", "cifar-resnet"])
def test_compiled_as_one_graph(name: str) -> None:
    """The option is ignored there; the results are the same."""
    torch._dynamo.reset()
    if name == "cifar-resnet":
        network = models.seeded(lambda: zoo.cifar_resnet(8, width=4, checkpoint=1))
    else:
        network = models.seeded(lambda: zoo.cifar_preact_resnet(11, "bottleneck", width=4, shortcut="A", checkpoint=1))
    compiled = torch.compile(copy.deepcopy(network).double(), fullgraph=True, backend="aot_eager")
    expected, found = models.results(network.double(), INPUT.double()), models.results(compiled, INPUT.double())
    for key, tensor in expected.items():
        named = key.replace("grad of ", "grad of _orig_mod.").replace("buffer ", "buffer _orig_mod.")
        torch.testing.assert_close(found[named], tensor, rtol=1e-7, atol=1e-9)
