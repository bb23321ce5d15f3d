"""The page about results: the aims, the machines, tables by level, and the layers that lose time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks import aims, labels, lost_time, roofs, speeds
from benchmarks.labels import number_text, ratio_text
from benchmarks.markdown import table
from benchmarks.records import CEILINGS, Record
from benchmarks.speeds import OURS, Comparison

RESTLESS = 0.15
"""A spread over which a measurement says more about the machine than about what was measured."""


def page(rows: Sequence[Record], drawn: Sequence[str] = (), remark: str = "") -> str:
    """The page, in Markdown, with the plots under these paths."""
    found = speeds.by_level(speeds.comparisons(rows))
    every = speeds.by_level(speeds.runs(rows))
    parts = ["# What the benchmarks say", *_aims(rows), *_machines(rows), *_levels(every), *lost_time.chapters(found)]
    if drawn or remark:
        parts += ["## Plots", *filter(None, [remark]), *(f"![{path}]({path})" for path in drawn)]
    return "\n\n".join(parts) + "\n"


def _aims(rows: Sequence[Record]) -> list[str]:
    found = aims.outcomes(rows)
    lines = [[one.aim.text, one.text, f"**{one.verdict}**", one.run] for one in found]
    parts = ["## Aims, ResNet-50 at 224x224", table(["aim", "measured", "", "run"], lines, left=1)]
    if any(one.verdict == "missed" for one in found):
        parts.append(
            "Where an aim is missed, the lists of layers at the end show what they lose; on the machine itself, "
            "`python -m resfuse explain resnet50 --measure` does, too."
        )
    return parts


def _machines(rows: Sequence[Record]) -> list[str]:
    parts = ["## Machines"]
    measured = [row for row in rows if row.level != CEILINGS]
    for device, threads in dict.fromkeys((row.conditions.device, row.conditions.threads) for row in measured):
        mine = [row for row in measured if (row.conditions.device, row.conditions.threads) == (device, threads)]
        parts.append(f"{labels.conditions_text(mine)}.")
        runs = dict.fromkeys(row.conditions for row in mine)
        ceilings = dict.fromkeys(text for run in runs if (text := labels.ceilings_text(roofs.ceilings(rows, run))))
        if ceilings:
            when = "the run" if len(ceilings) == 1 else "each run"
            parts.append(f"Ceilings, measured in {when}: {' | '.join(ceilings)}.")
        times = [row for row in mine if row.metric in (speeds.TIME, speeds.GRAPH_TIME)]
        restless = sum((row.p80 - row.p20) / row.p50 > RESTLESS for row in times)
        if restless:
            parts.append(
                f"The spread is over {RESTLESS:.0%} in {restless} of {len(times)} times: their ratios say little."
            )
        parts += _failures(mine)
    return parts


def _failures(rows: Sequence[Record]) -> list[str]:
    failed = Counter(row.provider for row in rows if row.metric.endswith(speeds.LEFT_OUT) and row.p50)
    names = ", ".join(f"{labels.label(provider)} ({count})" for provider, count in failed.items())
    return [f"Failed, or wrong and therefore not timed, in so many cases: {names}."] if failed else []


def _levels(found: Sequence[Comparison]) -> Iterator[str]:
    """A chapter for each level, mode, dtype and machine; runs of one case, with their own peers, stand side by side."""
    timed = [view for view in speeds.views(found) if view.times]
    for key in dict.fromkeys(_chapter(one) for one in timed):
        level, mode, dtype, device, threads, graphed = key
        how = f"{mode}, {dtype}{', CUDA graphs' * graphed}"
        yield f"## {level.capitalize()}s, {how}, {device}, {labels.threads_text(threads)}"
        chapter = [one for one in timed if _chapter(one) == key]
        yield _everyone(chapter) if level == "model" else _against_best(chapter)
        ours = [one for one in chapter if OURS in one.times]
        if len(ours) > 1:
            eager = speeds.geometric_mean(one.speed(OURS, one.base) for one in ours)
            peer = speeds.geometric_mean(one.against_best_peer() for one in ours)
            yield (
                f"Geometric mean of these {len(ours)}: resfuse has {ratio_text(eager)} the speed of eager, and "
                f"{ratio_text(peer)} that of the best peer."
            )


def _chapter(one: Comparison) -> tuple[str, str, str, str, int, bool]:
    first = one.first
    return first.level, first.mode, first.dtype, first.conditions.device, first.conditions.threads, one.graphed


def _everyone(chapter: Sequence[Comparison]) -> str:
    """Milliseconds of all providers."""
    providers = labels.ordered(provider for one in chapter for provider in one.times)
    head = ["ms", "batch", *map(labels.label, providers), "vs eager", "vs best peer", "roofline"]
    lines = []
    for one in chapter:
        medians = [one.median(provider) for provider in providers]
        times = ["-" if median is None else number_text(median * 1e3) for median in medians]
        lines.append([f"{_name(one, chapter)} {one.image}", str(one.batch), *times, *_ratios(one)])
    return table(head, lines)


def _against_best(chapter: Sequence[Comparison]) -> str:
    """resfuse and the fastest of its peers."""
    scale, unit = labels.time_unit(row.p50 for one in chapter for row in one.times.values())
    head = [unit, "input", "eager", "best peer", "its time", "resfuse", "vs eager", "vs best peer", "roofline"]
    lines = []
    for one in chapter:
        medians = [one.median(provider or "") for provider in (one.base, one.best_peer, OURS)]
        eager, peer, ours = ("-" if median is None else number_text(median * scale) for median in medians)
        name = labels.label(one.best_peer) if one.best_peer else "-"
        lines.append([_name(one, chapter), one.first.shape, eager, name, peer, ours, *_ratios(one)])
    return table(head, lines, left=2)


def _name(one: Comparison, chapter: Sequence[Comparison]) -> str:
    """With the run, where the chapter has several of the case."""
    several = sum(other.first.case == one.first.case for other in chapter) > 1
    return f"{one.first.name}, run of {one.first.conditions.date}" if several else one.first.name


def _ratios(one: Comparison) -> list[str]:
    fraction = one.times[OURS].roofline if OURS in one.times else None
    ratios = [ratio_text(one.speed(OURS, one.base)), ratio_text(one.against_best_peer())]
    return [*ratios, f"{fraction:.0%}" if fraction else "-"]
