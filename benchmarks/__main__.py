"""`make bench`: measure models, ops, host time and memory, then write the report and the README's table.

On a CPU this takes about 40 minutes on two cores, on a machine that does nothing else.  Finished cases are not measured
again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.results import RESULTS
from benchmarks.worker import ROOT


def steps(gpu: bool, quick: bool, output: Path) -> list[list[str]]:
    """The modules that are run, with their arguments."""
    common = ["--output", str(output)]
    resumed = [*common, "--resume", *(["--quick"] if quick else [])]
    if quick:
        return [
            ["benchmarks.models", "--mode", "inference", "train", *resumed],
            ["benchmarks.conv_bn_act", *resumed],
            ["benchmarks.overhead", "--quick", *common],
            ["benchmarks.memory", "--model", "cifar_resnet20", "--batch", "2", "4", "8", "--provider",
             "eager_channels_last", "resfuse", *common],
            ["benchmarks.report", str(output)],
        ]  # fmt: skip
    inference, train = (["1", "128"], "256") if gpu else (["1", "16"], "8")
    dtypes = ["bfloat16"] if gpu else ["float32", "bfloat16"]
    ops = ["--mode", "inference", "full"] if gpu else ["--mode", "inference"]
    return [
        ["benchmarks.models", "--mode", "inference", "--batch", *inference, "--dtype", *dtypes, *resumed],
        ["benchmarks.models", "--mode", "train", "--batch", train, *resumed],
        *([f"benchmarks.{op}", *ops, *resumed] for op in ("conv_bn_act", "bn_act", "add_relu")),
        ["benchmarks.overhead", *common],
        ["benchmarks.memory", *common],
        ["benchmarks.report", str(output)],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a step failed; the others are run all the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds: a trial, not a measurement")
    args = parser.parse_args(argv)
    failed = []
    for step in steps(torch.cuda.is_available(), args.quick, args.output.resolve()):
        print(f"$ python -m {' '.join(step)}", flush=True)
        if subprocess.run([sys.executable, "-m", *step], cwd=ROOT).returncode:
            failed.append(step[0])
    if failed:
        print(f"failed, or with a provider that failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
