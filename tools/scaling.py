"""The tables of docs/scaling.md: a training step on many GPUs by DistributedDataParallel, from a step on one.

Collectives follow NCCL's own model (src/graph/tuning.cc as of commit b647562): latency plus bytes over bandwidth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import nn

# (base, hop by NVLink, hop between nodes in a ring, in a tree: seconds; part of the bandwidth)
LL, SIMPLE = (6.6e-6, 0.6e-6, 2.7e-6, 5.0e-6, 0.25), (8.4e-6, 3.4e-6, 14.0e-6, 28.0e-6, 1.0)
LEAST_HOP = {LL: 1e-6, SIMPLE: 3e-6}  # of a ring across nodes
TREE = 0.92  # the bandwidth of a tree, of a ring's
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes at which DDP closes its buckets
IMAGES, EPOCHS, JPEG = 1_281_167, 90, 147_897_477_120 / 1_281_167  # of ImageNet
GPUS_PER_NODE = 8
NODE, NETWORK = 0.8 * 450e9, 0.8 * 50e9  # B/s out of one GPU within a node, and out of its network adapter


def bandwidth(gpus: int) -> float:
    """B/s of a ring; with several nodes there are as many rings as a node has adapters."""
    return NODE if gpus <= GPUS_PER_NODE else min(NODE, GPUS_PER_NODE * NETWORK)


def ring_latency(steps: int, between: int, gpus: int, protocol: tuple[float, ...]) -> float:
    """Seconds of `steps` hops, of which `between` go from node to node."""
    hop = protocol[1] if gpus <= GPUS_PER_NODE else max(protocol[1], LEAST_HOP[protocol])
    return (steps - between) * hop + between * protocol[2]


def all_reduce(size: float, gpus: int) -> float:
    """Seconds to sum `size` bytes over GPUs, by the quickest of ring and tree and of two protocols."""
    if gpus == 1:
        return 0.0
    nodes, found = -(-gpus // GPUS_PER_NODE), []
    for protocol in (LL, SIMPLE):
        base, node_hop, _, tree_hop, share = protocol
        rate = share * bandwidth(gpus)
        ring = ring_latency(2 * (gpus - 1), 2 * nodes if nodes > 1 else 0, gpus, protocol)
        tree = 2 * ((min(gpus, GPUS_PER_NODE) - 1) * node_hop + math.ceil(math.log2(nodes)) * tree_hop)
        found += [base + ring + 2 * (gpus - 1) / gpus * size / rate, base + tree + 2 * size / (TREE * rate)]
    return min(found)


def all_gather(size: float, gpus: int) -> float:
    """Seconds until each GPU has `size` bytes of each: a ring of n - 1 steps."""
    between = -(-gpus // GPUS_PER_NODE) - 1
    return min(
        protocol[0] + ring_latency(gpus - 1, between, gpus, protocol)
        + (gpus - 1) * size / (protocol[4] * bandwidth(gpus))
        for protocol in (LL, SIMPLE)
    )  # fmt: skip


def exposed(model: nn.Module, backward: float, gpus: int) -> tuple[float, float]:
    """(seconds of all all-reduces, seconds of them after the end of backward).

    Gradients get ready in the reverse order of the layers, each layer taking its part of backward by FLOPs, and DDP
    reduces them in buckets, one after the other.
    """
    gradients: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            gradients += [(getattr(module, "work", 0), module.weight.nbytes)]
            gradients += [(0, module.bias.nbytes)] if module.bias is not None else []
    total, now, size, limit = sum(work for work, _ in gradients), 0.0, 0, FIRST_BUCKET
    communication = end = 0.0
    for index, (work, nbytes) in enumerate(reversed(gradients)):
        now, size = now + backward * work / total, size + nbytes
        if size >= limit or index == len(gradients) - 1:
            seconds = all_reduce(size, gpus)
            communication, end = communication + seconds, max(end, now) + seconds
            size, limit = 0, BUCKET
    return communication, max(0.0, end - backward) if gpus > 1 else 0.0


def sync_bn(channels: Sequence[int], gpus: int) -> float:
    """Seconds of synchronised batch norm: per layer an all-gather of 2C + 1 float32 values and an all-reduce of 2C."""
    if gpus == 1:
        return 0.0
    return sum(all_gather(4 * (2 * c + 1), gpus) + all_reduce(8 * c, gpus) for c in channels)


def resnet50() -> nn.Module:
    """torchvision's, on the meta device, each layer with its work (multiply-adds of one image)."""
    from torchvision import models

    with torch.device("meta"):
        model = models.resnet50()

    def note(module: nn.Module, args: object, output: torch.Tensor) -> None:
        module.work = output.numel() * module.weight[0].numel()  # type: ignore[operator]

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return model


def main() -> None:
    """Print the table for a step time: milliseconds, thousands of images per second, GB/s of JPEGs, minutes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step-time", type=float, default=24.1e-3, help="seconds on one GPU (default %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images on each GPU (default %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 1024], help="default %(default)s")
    parser.add_argument("--sync-bn", type=int, default=1, metavar="GPUS", help="that share batch statistics")
    args = parser.parse_args()
    model = resnet50()
    channels = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    print("| GPUs | reduce | exposed | SyncBN | step | effic. | k img/s | GB/s | min |")
    for gpus in args.gpus:
        # Backward is two thirds of a step: two products for each of forward's.
        communication, after = exposed(model, args.step_time * 2 / 3, gpus)
        synced = sync_bn(channels, min(gpus, args.sync_bn))
        total = args.step_time + after + synced
        images = gpus * args.batch / total
        cells = [*(f"{1e3 * value:.2f}" for value in (communication, after, synced, total))]
        cells += [f"{args.step_time / total:.1%}", f"{images / 1e3:,.1f}", f"{images * JPEG / 1e9:,.1f}"]
        print(f"| {gpus} | {' | '.join(cells)} | {EPOCHS * IMAGES / images / 60:.1f} |")


if __name__ == "__main__":
    main()
