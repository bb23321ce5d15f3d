"""A step on many GPUs, from that of one."""

from __future__ import annotations

import functools
from typing import NamedTuple

from benchmarks.scaling.buckets import fill, overlap
from benchmarks.scaling.collectives import Cluster, all_gather, all_reduce
from benchmarks.scaling.profile import Profile

IMAGES, EPOCHS = 1_281_167, 90
"""Of ImageNet's training set (ILSVRC 2012), and of the usual schedule (Goyal et al. 2017, arXiv:1706.02677)."""
JPEG = 147_897_477_120 / IMAGES
"""B of an image: the size of ILSVRC2012_img_train.tar, by the number of images."""


class SyncBN(NamedTuple):
    """The messages of synchronised batch norm in one step, on each GPU."""

    messages: int
    size: int
    """B that a GPU contributes to them."""
    seconds: float
    """None of it overlaps: the layer's own output waits for the gather, its own gradient for the sums."""


class Estimate(NamedTuple):
    """A step on so many GPUs."""

    gpus: int
    buckets: int
    reduced: int
    """B of gradients that are all-reduced."""
    sent: float
    """B that each GPU sends for them, by a ring: 2 (n - 1) / n of `reduced`."""
    communication: float
    exposed: float
    """s of the all-reduces, and of those after the end of backward."""
    sync_bn: float
    """s of synchronised batch norm's messages; 0 without."""
    seconds: float
    """Of the step."""
    efficiency: float
    """Images per second and GPU, relative to one GPU alone."""
    images: float
    """Per second, all GPUs together."""
    data: float
    """B/s of JPEGs that have to be read."""
    training: float
    """s for `EPOCHS` epochs of ImageNet."""


def sync_bn(norms: tuple[int, ...], gpus: int, cluster: Cluster) -> SyncBN:
    """One all-gather of 2C + 1 float32 values per batch norm in forward, one all-reduce of 2C in backward.

    Source: `resfuse/ops/sync_bn_act.py`; PyTorch's own has the same two.
    """
    if gpus == 1:
        return SyncBN(0, 0, 0.0)
    gathered, reduced = ([4 * (2 * channels + extra) for channels in norms] for extra in (1, 0))
    seconds = sum(all_gather(size, gpus, cluster) for size in gathered)
    seconds += sum(all_reduce(size, gpus, cluster) for size in reduced)
    return SyncBN(2 * len(norms), sum(gathered) + sum(reduced), seconds)


def estimate(profile: Profile, batch: int, gpus: int, cluster: Cluster, sync_group: int = 1) -> Estimate:
    """A step of DistributedDataParallel.

    Args:
        profile: of one GPU.
        batch: images on each GPU.
        gpus: how many.
        cluster: what connects them.
        sync_group: GPUs that share the statistics of batch norms; 1 for none, as many as `gpus` for all.

    Raises:
        ValueError: `gpus`, `batch` or `sync_group` is not positive.
    """
    for name, value in (("gpus", gpus), ("batch", batch), ("sync_group", sync_group)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    buckets = fill(profile.backward)
    reduce = functools.partial(all_reduce, gpus=gpus, cluster=cluster)
    found = overlap(buckets, profile.backward_seconds, reduce)
    synced = sync_bn(profile.norms, min(sync_group, gpus), cluster).seconds
    seconds = profile.seconds + found.exposed + synced
    images = gpus * batch / seconds
    size = profile.gradient_bytes
    return Estimate(
        gpus=gpus, buckets=len(buckets), reduced=size, sent=2 * (gpus - 1) / gpus * size,
        communication=found.communication, exposed=found.exposed, sync_bn=synced, seconds=seconds,
        efficiency=profile.seconds / seconds, images=images, data=images * JPEG, training=EPOCHS * IMAGES / images,
    )  # fmt: skip
