"""Write the tables of docs/scaling.md."""

from __future__ import annotations

import torch

from benchmarks import pages
from benchmarks.memory.tables import Table
from benchmarks.records import ROOT
from benchmarks.scaling.__main__ import table
from benchmarks.scaling.collectives import Cluster, all_gather, all_reduce
from benchmarks.scaling.estimate import sync_bn
from benchmarks.scaling.profile import roofline_profile
from resfuse.costs import describe

PAGE = ROOT / "docs" / "scaling.md"
MODEL, BATCHES, DEVICE = "resnet50", (256, 32), "h200"
GPUS = (1, 8, 64, 1024)


def page_tables() -> dict[str, str]:
    """By name, as Markdown: ResNet-50 in bfloat16, at the bound of the cost model."""
    cluster = Cluster()
    found = {}
    for batch in BATCHES:
        profile = roofline_profile(MODEL, batch, torch.bfloat16, describe(DEVICE))
        found[f"batch{batch}"] = table(profile, batch, GPUS, cluster).markdown()
    found["collectives"] = _collectives(cluster)
    found["sync_bn"] = _sync_bn(profile.norms, cluster)
    return found


def _collectives(cluster: Cluster) -> str:
    sizes = {"4 kB": 4 << 10, "1 MiB": 1 << 20, "25 MiB": 25 << 20}
    rows = []
    for gpus in GPUS[1:]:
        gathered = all_gather(sizes["4 kB"], gpus, cluster)
        times = (*(all_reduce(size, gpus, cluster) for size in sizes.values()), gathered)
        rows.append((str(gpus), *(f"{1e6 * seconds:,.0f}" for seconds in times)))
    columns = ("GPUs", *(f"all-reduce of {name}" for name in sizes), "all-gather of 4 kB each")
    return Table("", columns, tuple(rows)).markdown()


def _sync_bn(norms: tuple[int, ...], cluster: Cluster) -> str:
    rows = []
    for gpus in GPUS[1:]:
        messages = sync_bn(norms, gpus, cluster)
        latency = sync_bn((0,) * len(norms), gpus, cluster).seconds  # the same messages with next to nothing in them
        cells = (messages.messages, f"{messages.size / 1e3:.0f}", f"{1e3 * messages.seconds:.2f}")
        rows.append((str(gpus), *map(str, cells), f"{latency / messages.seconds:.0%}"))
    return Table("", ("GPUs", "messages", "kB of each GPU", "ms per step", "of it latency"), tuple(rows)).markdown()


if __name__ == "__main__":
    pages.write(PAGE, page_tables())
