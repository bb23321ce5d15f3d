"""The pieces as data, in the order in which `make gpu` does them: what is worth most comes first.

Words in braces are filled in: {work} is the folder of all pieces' files, {device} where they run, {limit} the seconds
that a step has.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Group = Literal["test", "bench", "tune", "report"]
GROUPS: tuple[Group, ...] = ("test", "bench", "tune", "report")
DEVICE = ("--device", "{device}")


@dataclasses.dataclass(frozen=True)
class Step:
    """A module that is run: `python -m <module> <arguments>`."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    minutes: float = 8.0
    """After which it is interrupted."""
    least: float = 0.5
    """Minutes that have to be left for it to be begun: what is measured together is kept when all of it is done."""
    rehearsal: tuple[str, ...] | None = None
    """The arguments instead, where a machine without a GPU tries the pieces out; None: it is left out there."""
    needs: tuple[str, ...] = ()
    """Packages without which it is left out."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Steps that belong together."""

    name: str
    group: Group
    what: str
    minutes: float
    """Expected, on a machine with an H200 and 16 cores; no step lasts longer than its own limit."""
    steps: tuple[Step, ...]
    tables: bool = False
    """Whether the Triton backend finds the tables that `tune` writes."""
    every_call: bool = False
    """Whether it is done in every call that does anything else: a fresh machine has nothing of it."""


BENCH = "{work}/bench"
UNTUNED = "{work}/untuned"


def bench(
    name: str, *arguments: str, output: str = BENCH, rehearsal: tuple[str, ...] | None = None, least: float = 1.5
) -> Step:
    """A step of benchmarks.run, which leaves out what its file has of the same commit."""
    common = ("--resume", "--limit", "{limit}", "--output", output, *DEVICE)
    tried = None if rehearsal is None else (*rehearsal, "--quick", *common)
    return Step(name, "benchmarks.run", (*arguments, *common), rehearsal=tried, least=least)


def models(
    mode: str, batch: str, names: str, *more: str, output: str = BENCH, rehearsed: str = "", least: float = 3
) -> Step:
    """A step that measures whole models in bfloat16, which takes all providers' compilers some minutes for each.

    `rehearsed` names the model that a rehearsal takes.
    """
    arguments = ("--level", "model", "--mode", mode, "--model", *names.split(), "--batch", batch)
    small = ("--level", "model", "--mode", mode, "--model", rehearsed, "--dtype", "float32", *EAGER_AND_RESFUSE)
    tried = small if rehearsed else None
    name = f"{names}, {mode}, batch {batch}"
    return bench(name, *arguments, "--dtype", "bfloat16", *more, output=output, rehearsal=tried, least=least)


def tune(kind: str, batch: str, rehearsed: bool = False) -> Step:
    """A step that measures the most promising configurations of ResNet-50's layers, in one kind and batch."""
    tried = ("tune", "--model", "cifar_resnet", "--kind", kind, "--batch", "2", "--dry-run") if rehearsed else None
    arguments = ("tune", "--model", "resnet50", "--kind", kind, "--batch", batch, "--candidates", "8")
    return Step(f"{kind}, batch {batch}", "resfuse", arguments, 5, least=1.5, rehearsal=tried, needs=("rich",))


def explain(mode: str, batch: str, *more: str, rehearsed: bool = False) -> Step:
    """A step that times every operator of ResNet-50 alone, and says how far it is from the least time."""
    common = ("--measure", "--output", f"{BENCH}/explain-{mode}.json", *DEVICE, *more)
    tried = ("explain", "cifar_resnet8", "--batch", "2", *common) if rehearsed else None
    arguments = ("explain", "resnet50", "--batch", batch, "--dtype", "bfloat16", *common)
    return Step(f"{mode}, batch {batch}", "resfuse", arguments, 4, least=1.5, rehearsal=tried)


EAGER_AND_RESFUSE = ("--provider", "eager_nchw", "resfuse")
# On the machine that did `aims`, Inductor's cache has what max-autotune compiled; on another it may come
# too late, and is left out.
AGAINST = (
    "--provider", "eager_channels_last", "inductor", "resfuse", "resfuse_cuda", "resfuse_triton",
    "inductor_max_autotune",
)  # fmt: skip
FAMILY = "resnet18 resnet50 resnet101 resnet152 resnext50_32x4d"
SHARE = ("--share", "{work}/suite", *DEVICE, "--limit", "{limit}")
LAYERS = ("--level", "layer", "--model", "resnet50", "--dtype", "bfloat16", "--mode")
SANITIZE = ("--output", "{work}/sanitize", *DEVICE, "--limit", "{limit}")
BUILD = ("--keep", "{work}/built", *DEVICE)
MEMORY = ("--resume", "--limit", "{limit}", "--output", BENCH, *DEVICE)
REPORT = ("bench", "--report", BENCH, UNTUNED)
HARDWARE = "tests/test_cuda_hardware.py"
NOT_SANITIZED = ("--deselect", f"{HARDWARE}::test_compute_sanitizer")

PIECES: tuple[Piece, ...] = (
    Piece("build", "test", "compile the extension libraries in place, for this GPU's architecture", 2, (
        Step("build", "benchmarks.gpu.build", BUILD, rehearsal=BUILD),
    ), every_call=True),
    Piece("check", "test", "versions, the numerical contract of every backend, and what only a GPU can tell", 4, (
        Step("info", "resfuse", ("info",), 1, rehearsal=("info",), needs=("rich",)),
        Step("hardware", "benchmarks.gpu.suite",
             (*SHARE, "--workers", "1", "--per-test", "60", "--", HARDWARE, "-m", "not slow"), 4,
             rehearsal=(*SHARE, "--workers", "1", "--", "tests/test_layout.py")),
        Step("verify cuda", "resfuse", ("verify", "--backend", "cuda"), 3,
             rehearsal=("verify", "--backend", "reference", "--op", "add_relu", "--dtype", "float32"), needs=("rich",)),
        # Of the other dtypes the kernels are compiled for minutes, and held to the same by the suite.
        Step("verify triton", "resfuse", ("verify", "--backend", "triton", "--dtype", "bfloat16"), 3, needs=("rich",)),
    )),
    Piece("aims", "bench", "ResNet-50 in bfloat16, against all peers: what this project aims at", 8, (
        models("inference", "128", "resnet50", output=UNTUNED, rehearsed="resnet18", least=5),
        models("train", "256", "resnet50", output=UNTUNED, least=4),
        models("inference", "1", "resnet50", output=UNTUNED, least=5),
    )),
    Piece("suite", "test", "the whole test suite on the GPU, by several processes", 7, (
        Step("suite", "benchmarks.gpu.suite", (*SHARE, "--", *NOT_SANITIZED, "tests"), least=1.5,
             rehearsal=(*SHARE, "--workers", "2", "--", "tests/test_layout.py", "tests/test_contract.py")),
    )),
    Piece("tune", "tune", "the Triton kernels' tables for ResNet-50: inference at 128, training at 256", 8, (
        tune("forward", "128", rehearsed=True), tune("train", "256"),
    ), tables=True),
    Piece("tuned", "bench", "ResNet-50 again, with the tables that `tune` wrote", 6, (
        models("inference", "128", "resnet50", *AGAINST),
        models("train", "256", "resnet50", *AGAINST, rehearsed="resnet18"),
    ), tables=True),
    Piece("sanitize", "test", "compute-sanitizer's four tools over every kernel, on small shapes", 8, (
        Step("sanitize", "benchmarks.gpu.sanitize", SANITIZE, least=2, rehearsal=SANITIZE),
    )),
    Piece("layers", "bench", "every layer of ResNet-50: where the time goes", 8, (
        bench("layers, inference", *LAYERS, "inference", "--batch", "128"),
        bench("layers, train", *LAYERS, "train", "--batch", "256", rehearsal=("--level", "layer", *EAGER_AND_RESFUSE)),
    ), tables=True),
    Piece("explain", "bench", "every operator of ResNet-50 alone, against the least time that it needs", 4, (
        explain("inference", "128", rehearsed=True), explain("train", "256", "--train"),
    ), tables=True),
    Piece("memory", "bench", "peak memory over the batch, the largest batch that fits, host time", 5, (
        Step("resnet50", "benchmarks.memory",
             ("--level", "model", "--model", "resnet50", "--dtype", "bfloat16", *MEMORY),
             rehearsal=("--level", "model", "--model", "cifar_resnet20", "--dtype", "float32", "--batch", "2",
                        "--provider", "eager_channels_last", "resfuse", *MEMORY)),
        Step("the others", "benchmarks.memory", ("--dtype", "bfloat16", *MEMORY)),
        Step("host time", "benchmarks.overhead", ("--output", BENCH, *DEVICE),
             rehearsal=("--quick", "--output", BENCH, *DEVICE)),
    ), tables=True),
    Piece("tune-more", "tune", "tables for batch 1, and for the gradients", 8, (
        tune("forward", "1"), tune("dgrad", "256", rehearsed=True), tune("wgrad", "256", rehearsed=True),
    ), tables=True),
    Piece("models", "bench", "the other models, and other batches", 8, (
        models("inference", "16", FAMILY),
        models("train", "128", FAMILY),
        models("train", "128", "cifar_resnet20 cifar_resnet110", rehearsed="cifar_resnet20"),
    ), tables=True),
    Piece("blocks", "bench", "operators and residual blocks", 8, (
        bench("operators, train", "--level", "op", "--mode", "train", "--dtype", "bfloat16",
              rehearsal=("--level", "op", "--mode", "train", *EAGER_AND_RESFUSE)),
        bench("blocks, inference", "--level", "block", "--mode", "inference", "--dtype", "bfloat16"),
        bench("blocks, train", "--level", "block", "--mode", "train", "--dtype", "bfloat16"),
    ), tables=True),
    Piece("report", "report", "tables and plots of all that was measured", 1, (
        Step("report", "resfuse", REPORT, rehearsal=REPORT),
    )),
)  # fmt: skip


def named(names: list[str] | None, groups: list[Group] | None) -> list[Piece]:
    """Pieces by name and group, in their order, and what they need in every call; all where neither is given.

    Raises:
        ValueError: a name is not known.
    """
    known = {piece.name for piece in PIECES}
    if unknown := sorted(set(names or ()) - known):
        raise ValueError(f"--piece: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    chosen = [
        piece
        for piece in PIECES
        if (not names and not groups) or piece.name in (names or ()) or piece.group in (groups or ())
    ]
    built = any(piece.group != "report" for piece in chosen)
    return [piece for piece in PIECES if piece in chosen or (built and piece.every_call)]
