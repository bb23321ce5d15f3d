"""Models of libraries that are not needed to work on resfuse: `make test-full` installs them (`.[test-models]`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resfuse import fuse_, unfuse_
from tests import models

pytestmark = pytest.mark.slow

SIZES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "embedding_size": 16}


def joined(model: nn.Module, images: Tensor) -> Tensor:
    """All tensors that a model returns, as one."""
    found = model(images)
    if isinstance(found, Tensor):
        return found.flatten(1)
    values = found.values() if isinstance(found, Mapping) else found
    return torch.cat([value.flatten(1) for value in values if isinstance(value, Tensor)], 1)


def transformers_model(kind: str, layer_type: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {"groups_width": 8} if kind == "RegNet" else {}
    config = getattr(transformers, f"{kind}Config")(layer_type=layer_type, **SIZES, **options)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def pytorchcv_model(name: str) -> nn.Module:
    return pytest.importorskip("pytorchcv.model_provider").get_model(name)


def segmentation_model(name: str, encoder: str) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, name)(encoder, encoder_weights=None, classes=3)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):  # draws in another order in another memory format
            module.p = 0.0
    return model


# Model -> (constructor, size of the images, fused calls, those that begin with a convolution, residuals).
LIBRARIES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int, int]]] = {
    "transformers ResNet": (lambda: transformers_model("ResNet", "bottleneck"), 64, (19, 19, 5)),
    "transformers ResNet, basic": (lambda: transformers_model("ResNet", "basic"), 64, (14, 14, 5)),
    "transformers RegNet": (lambda: transformers_model("RegNet", "y"), 64, (20, 20, 5)),
    "transformers RegNet x": (lambda: transformers_model("RegNet", "x"), 64, (20, 20, 5)),
    "pytorchcv resnet20_cifar10": (lambda: pytorchcv_model("resnet20_cifar10"), 32, (21, 21, 9)),
    "pytorchcv diaresnet20_cifar10": (lambda: pytorchcv_model("diaresnet20_cifar10"), 32, (30, 21, 9)),
    "pytorchcv preresnet20_cifar10": (lambda: pytorchcv_model("preresnet20_cifar10"), 32, (19, 0, 0)),
    "smp Unet": (lambda: segmentation_model("Unet", "resnet18"), 64, (30, 30, 8)),
    "smp FPN": (lambda: segmentation_model("FPN", "resnet18"), 64, (20, 20, 8)),
    "smp DeepLabV3Plus": (lambda: segmentation_model("DeepLabV3Plus", "resnet18"), 64, (29, 29, 8)),
    "smp Linknet": (lambda: segmentation_model("Linknet", "resnet18"), 64, (35, 30, 8)),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_library_equals_eager(name: str) -> None:
    build, size, expected = LIBRARIES[name]
    report = models.assert_equal_before_and_after(build, (2, 3, size, size), joined)
    assert (report.fused_ops, report.convolutions, report.additions) == expected
    assert report.left_norms == 0


@models.compiles
@pytest.mark.parametrize("name", ["transformers ResNet", "pytorchcv resnet20_cifar10", "smp Unet"])
def test_library_is_compiled_exported_copied_and_unfused(name: str) -> None:
    build, size, _ = LIBRARIES[name]
    fused, eager, _ = models.both(build)
    for model in (fused, eager):
        model.eval()
    images = models.random_input((2, 3, size, size))
    with torch.no_grad():
        expected = joined(eager, images)
        for model in (copy.deepcopy(fused), models.reloaded(fused)):
            torch.testing.assert_close(joined(model, images), expected, rtol=1e-4, atol=1e-4)
        compiled: Any = torch.compile(fused, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(joined(compiled, images), expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        exported = torch.export.export(fused, (images,)).module()
        torch.testing.assert_close(joined(exported, images), expected, rtol=1e-4, atol=1e-4)
        unfuse_(fused)
        assert [type(module) for module in fused.modules()] == [type(module) for module in eager.modules()]
        torch.testing.assert_close(joined(fused, images), expected)


def test_deep_network_is_followed_once() -> None:
    """Not once per block: the 155 calls are recorded once each."""
    import torchvision

    from resfuse.fuse import follow

    recorded = []
    record = follow._Follower.record

    def counted(self: Any, *args: Any) -> Any:
        recorded.append(args)
        return record(self, *args)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(follow._Follower, "record", counted)
        report = fuse_(torchvision.models.resnet152())
    assert len(recorded) == report.fused_ops == 155
