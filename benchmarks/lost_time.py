"""Where resfuse loses time: layers on which a peer is faster, and layers that are far below the roofline."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import labels
from benchmarks.labels import number_text, ratio_text
from benchmarks.markdown import table
from benchmarks.speeds import OURS, Comparison

LONGEST = 15
"""Lines of a list."""


class Loss(NamedTuple):
    """What a layer loses."""

    one: Comparison
    against: str
    """The peer, or what else it is held against."""
    could: float
    """Seconds that it would take like that."""

    @property
    def lost(self) -> float:
        """Seconds, in all places of the network where the layer is."""
        return (self.one.times[OURS].p50 - self.could) * occurrences(self.one.first.name)


def occurrences(name: str) -> int:
    """How often a network has a layer: 3 for "resnet50 layer1.0.conv2 x3"."""
    count = re.search(r" x(\d+)$", name)
    return int(count[1]) if count else 1


def layers(found: Sequence[Comparison]) -> list[Comparison]:
    """Those of layers that resfuse has times of; by CUDA graphs, where they were captured."""
    views = [one.views[-1] for one in found if one.first.level == "layer"]
    return [one for one in views if OURS in one.times]


def to_peers(found: Sequence[Comparison]) -> list[Loss]:
    """The layers on which a peer is faster, the most time lost first."""
    slower = []
    for one in found:
        peer, speed = one.best_peer, one.against_best_peer()
        if peer and speed and speed < 1:
            slower.append(Loss(one, peer, one.times[peer].p50))
    return sorted(slower, key=lambda loss: -loss.lost)


def to_roofline(found: Sequence[Comparison]) -> list[Loss]:
    """The layers that take longer than the machine's ceilings ask for, the most time lost first."""
    below = []
    for one in found:
        row = one.times[OURS]
        if row.roofline and row.roofline < 1:
            below.append(Loss(one, "roofline", row.p50 * row.roofline))
    return sorted(below, key=lambda loss: -loss.lost)


def chapters(found: Sequence[Comparison]) -> list[str]:
    """Both lists, in Markdown; nothing where no layers were measured."""
    mine = layers(found)
    if not mine:
        return []
    compared = [one for one in mine if one.best_peer]
    return [
        *_chapter("Layers on which a peer is faster", "best peer", compared, to_peers),
        *_chapter("Layers by their time above the roofline", "against", mine, to_roofline),
    ]


def _chapter(
    title: str, against: str, mine: Sequence[Comparison], losses: Callable[[Sequence[Comparison]], list[Loss]]
) -> list[str]:
    found = losses(mine)
    if not found:
        return [f"## {title}", f"None of {len(mine)}."]
    head = ["layer", "", against, "resfuse us", "could be us", "lost us, all places", "vs best peer", "roofline"]
    lines = []
    for loss in found[:LONGEST]:
        one, row = loss.one, loss.one.times[OURS]
        what = f"{one.first.mode}, {one.first.dtype}, batch {one.batch}{', CUDA graphs' * one.graphed}"
        times = [number_text(seconds * 1e6) for seconds in (row.p50, loss.could, loss.lost)]
        fraction = f"{row.roofline:.0%}" if row.roofline else "-"
        lines.append(
            [one.first.name, what, labels.label(loss.against), *times, ratio_text(one.against_best_peer()), fraction]
        )
    more = f"; the {LONGEST} that lose most" if len(found) > LONGEST else ""
    total = number_text(sum(loss.lost for loss in found) * 1e3)
    said = f"{len(found)} of {len(mine)}, which lose {total} ms in all places together{more}:"
    return [f"## {title}", said, table(head, lines, left=3)]
