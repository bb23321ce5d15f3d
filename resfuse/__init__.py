"""resfuse: fused convolution + batch norm + ReLU and residual add + ReLU for residual networks in PyTorch."""

from resfuse import models, nn
from resfuse.backends.dispatch import available_backends, use_backend
from resfuse.explain import explain
from resfuse.functional import add_relu, bn_act, conv_bn_act
from resfuse.fuse import fuse_, unfuse_

__version__ = "0.1.0"

__all__ = [
    "add_relu",
    "available_backends",
    "bn_act",
    "conv_bn_act",
    "explain",
    "fuse_",
    "models",
    "nn",
    "unfuse_",
    "use_backend",
]
