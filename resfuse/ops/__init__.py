"""The operators: schemas, fake implementations and gradients.  Nothing here knows how a backend computes.

Each file holds one operator family: what is registered with PyTorch's dispatcher (for torch.compile and torch.export)
and the `torch.autograd.Function`.  In eager mode the Function calls the backend directly, which saves the dispatcher's
6-11 us per call; while compiling it calls the registered operator.
"""

from resfuse.ops import add_relu, bn_act, conv_bn_act, sync_bn_act

__all__ = ["add_relu", "bn_act", "conv_bn_act", "sync_bn_act"]
