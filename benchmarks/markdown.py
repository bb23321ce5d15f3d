"""Write the README's table of speeds from CSV files, between its two markers."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import labels, options, speeds
from benchmarks.labels import ratio_text
from benchmarks.records import ROOT, Record
from benchmarks.speeds import OURS, Comparison

WIDTH = 120
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
MODEL, IMAGE = "resnet50", "3x224x224"
BATCHES = {"inference": (1, 16, 128), "train": (8, 256)}
"""Those that the README shows, where they were measured."""
FAMILIES = ("eager_nchw", "eager_channels_last", "inductor", "cudnn", "onnxruntime", "openvino", "tensorrt", OURS)
"""Columns; of a system that ran in several ways the fastest counts, except for resfuse, which chooses itself."""
MODES = {"inference": "inference", "train": "training step"}


def main(argv: Sequence[str] | None = None) -> int:
    """Replace the section; 1 where that is impossible, or where `--check` finds that it would change."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.markdown", description=options.summary(__doc__))
    parser.add_argument(
        "csv", nargs="*", type=Path, help=f"files that the benchmarks wrote (default {options.RESULTS})"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="default %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing; the exit code says whether it is current")
    args = parser.parse_args(argv)
    try:
        before = args.readme.read_text()
        after = replace(before, section(speeds.read_all(args.csv or committed())))
    except (OSError, ValueError) as error:
        print(f"{args.readme} stays as it is: {error}", file=sys.stderr)
        return 1
    if before == after:
        print(f"{args.readme} is current")
        return 0
    if args.check:
        print(f"{args.readme} is not what the results give: run python -m benchmarks.markdown", file=sys.stderr)
        return 1
    args.readme.write_text(after)
    print(f"Wrote {args.readme}")
    return 0


def committed() -> list[Path]:
    """The results that lie in the repository: of every machine, folders below included."""
    folder = ROOT / options.RESULTS
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return [path for one in folders for path in speeds.result_files(one)]


def replace(text: str, section: str) -> str:
    """The text with what is between the markers replaced.

    Raises:
        ValueError: it has not exactly one marker of each kind, in their order.
    """
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END not in rest:
        raise ValueError(f"expected one line {BEGIN} and, below it, one line {END}")
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def section(rows: Sequence[Record]) -> str:
    """A table of milliseconds for each machine, with its conditions below."""
    models = speeds.select(speeds.comparisons(rows), level="model", name=MODEL)
    found = [view for view in speeds.views(models) if _shown(view)]
    if not found:
        raise ValueError(f"no results of {MODEL} at {IMAGE}")
    machines = dict.fromkeys((one.first.conditions.device, one.first.conditions.threads) for one in found)
    parts = []
    for machine in sorted(machines, key=lambda machine: not machine[0].startswith(speeds.GPUS)):
        mine = [one for one in found if (one.first.conditions.device, one.first.conditions.threads) == machine]
        parts.append(_machine(sorted(mine, key=_order)))
    return "\n\n".join(parts)


def _shown(one: Comparison) -> bool:
    mode = one.first.mode
    return OURS in one.times and one.image == IMAGE and one.batch in BATCHES.get(mode, ())


def _order(one: Comparison) -> tuple[object, ...]:
    return list(MODES).index(one.first.mode), one.batch, one.first.dtype != "float32", one.first.dtype, one.graphed


def _machine(found: Sequence[Comparison]) -> str:
    fastest = [{family: _fastest(one, family) for family in FAMILIES} for one in found]
    shown = [family for family in FAMILIES if any(names[family] for names in fastest)]
    head = [
        "",
        *(f"**{OURS}**" if family == OURS else labels.label(family) for family in shown),
        "vs fastest peer",
    ]
    lines = []
    for one, names in zip(found, fastest, strict=True):
        cells = [f"{MODES[one.first.mode]}, {one.first.dtype}, batch {one.batch}{', CUDA graphs' * one.graphed}"]
        cells += [_milliseconds(one, names[family]) for family in shown]
        lines.append([*cells, ratio_text(one.against_best_peer())])
    rows = [row for one in found for row in one.times.values()]
    conditions = labels.conditions_text(rows)
    return "\n\n".join(
        [
            f"ResNet-50 at 224x224, {found[0].first.conditions.device}, median milliseconds per step:",
            table(head, lines),
            "\n".join(textwrap.wrap(f"{_ranges(found)} Conditions: {conditions}. {_spread(rows)}", WIDTH)),
        ]
    )


def _fastest(one: Comparison, family: str) -> str | None:
    """The family's provider with the least time; where it is eager or resfuse, that very one."""
    if family == OURS or family.startswith("eager"):
        return family if family in one.times else None
    names = [name for name in one.times if name == family or name.startswith(f"{family}_")]
    return min(names, key=lambda name: one.times[name].p50, default=None)


def _milliseconds(one: Comparison, provider: str | None) -> str:
    if provider is None:
        return "-"
    value = one.times[provider].p50 * 1e3
    return f"{value:.0f}" if value >= 20 else f"{value:.3g}"


def _ranges(found: Sequence[Comparison]) -> str:
    """What the table says, in a sentence."""
    parts = []
    for mode, words in MODES.items():
        mine = [one for one in found if one.first.mode == mode]
        eager = [speed for one in mine if (speed := one.speed(OURS, one.base))]
        peer = [speed for one in mine if (speed := one.against_best_peer())]
        if eager and peer:
            base = labels.label(next(one.base for one in mine if one.base) or "")
            parts.append(f"{words} {_range(eager)} {base}'s, {_range(peer)} the fastest peer's")
    return f"Speed of resfuse: {'; '.join(parts)}." if parts else ""


def _range(ratios: Sequence[float]) -> str:
    low, high = ratio_text(min(ratios)), ratio_text(max(ratios))
    return low if low == high else f"{low} to {high}"


def _spread(rows: Iterable[Record]) -> str:
    widest = max((row.p80 - row.p20) / row.p50 for row in rows)
    return f"p80 and p20 are at most {widest:.0%} of the median apart."


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text and whose others are numbers."""
    rule = ["---" if index < left else "--:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


if __name__ == "__main__":
    raise SystemExit(main())
