"""What a training step costs on many GPUs: DDP's all-reduces, synchronised batch norm, data, time for ImageNet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import options, records
from benchmarks.memory.tables import Table
from benchmarks.scaling.collectives import Cluster
from benchmarks.scaling.estimate import EPOCHS, Estimate, estimate
from benchmarks.scaling.profile import Profile, roofline_profile
from resfuse.costs import DEVICES, describe


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        _show(args)
    except ValueError as error:  # no such network, no such row of the file
        raise SystemExit(str(error)) from error
    return 0


def _show(args: argparse.Namespace) -> None:
    device = describe(args.device)
    profile = roofline_profile(args.model, args.batch, options.DTYPES[args.dtype], device, args.size)
    bound = profile.seconds
    if args.csv is not None:
        args.step_time = measured_seconds(args.csv, args.model, args.batch, args.dtype, args.provider)
    if args.step_time is None:
        origin = f"the bound of the cost model on {device.name}, not a measurement"
    else:
        profile, origin = profile.scaled(args.step_time), "given" if args.csv is None else f"measured, {args.csv}"
    what = f"{args.model}, {args.dtype}, batch {args.batch} on each GPU"
    print(f"{what}: {1e3 * profile.seconds:.2f} ms on one GPU ({origin}; bound {1e3 * bound:.2f} ms)")
    cluster = Cluster(args.gpus_per_node, 1e9 * args.node_bandwidth, 1e9 * args.network_bandwidth)
    table(profile, args.batch, args.gpus, cluster, args.sync_bn).show()


def table(profile: Profile, batch: int, gpus: Sequence[int], cluster: Cluster, sync_group: int | None = None) -> Table:
    """A row for each number of GPUs.

    Args:
        profile, batch, cluster: see `estimate`.
        gpus: how many.
        sync_group: GPUs that share batch statistics; None: no synchronised batch norm, 0: all of them.
    """
    found = [estimate(profile, batch, n, cluster, 1 if sync_group is None else sync_group or n) for n in gpus]
    first = found[0]
    gradients = f"{first.reduced / 1e6:.1f} MB of gradients in {first.buckets} buckets"
    title = f"{gradients}: milliseconds; data; minutes for {EPOCHS} epochs of ImageNet"
    columns = ("GPUs", "reduce", "exposed", "SyncBN", "step", "effic.", "k img/s", "GB/s", "min")
    return Table(title, columns, tuple(_row(one) for one in found))


def measured_seconds(path: Path, model: str, batch: int, dtype: str, provider: str) -> float:
    """The median time of a training step that a benchmark has written into a file.

    Raises:
        ValueError: the file has no such row.
    """
    rows = [
        row for row in records.read(path)
        if (row.level, row.name, row.mode, row.metric) == ("model", model, "train", "time")
        and (row.provider, row.dtype, row.shape.partition("x")[0]) == (provider, dtype, str(batch))
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"{path} has no time of a training step of {model} by {provider}, {dtype}, batch {batch}")
    return max(rows, key=lambda row: row.conditions.date).p50


def _row(one: Estimate) -> tuple[str, ...]:
    return (
        f"{one.gpus}", f"{1e3 * one.communication:.2f}", f"{1e3 * one.exposed:.2f}", f"{1e3 * one.sync_bn:.2f}",
        f"{1e3 * one.seconds:.2f}", f"{one.efficiency:.1%}", f"{one.images / 1e3:,.1f}", f"{one.data / 1e9:,.1f}",
        f"{one.training / 60:.1f}",
    )  # fmt: skip


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=options.summary(__doc__))
    usual = Cluster()
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=_count, default=256, help="images on each GPU (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of activations")
    parser.add_argument("--size", type=_count, help="height and width of the images (default: the network's own)")
    parser.add_argument("--gpus", nargs="+", type=_count, default=[1, 8, 64, 1024])
    step = parser.add_mutually_exclusive_group()
    step.add_argument(
        "--step-time", type=_positive, metavar="SECONDS", help="of one GPU; default: the cost model's bound"
    )
    step.add_argument("--csv", type=Path, help="take it from a file that benchmarks.run wrote")
    parser.add_argument("--provider", default="resfuse", help="whose time of the file (default %(default)s)")
    parser.add_argument(
        "--sync-bn", type=_count, nargs="?", const=0, metavar="GPUS",
        help="synchronised batch norm, over groups of so many GPUs (default: over all)",
    )  # fmt: skip
    parser.add_argument("--device", choices=list(DEVICES), default="h200", help="for the cost model")
    parser.add_argument("--gpus-per-node", type=_count, default=usual.gpus_per_node)
    parser.add_argument(
        "--node-bandwidth", type=_positive, default=usual.node_bandwidth / 1e9, metavar="GB/S",
        help="out of a GPU within a node: the bus bandwidth of nccl-tests (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--network-bandwidth", type=_positive, default=usual.network_bandwidth / 1e9, metavar="GB/S",
        help="out of a GPU's network adapter (default %(default)s)",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
