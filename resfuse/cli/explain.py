"""Explain which backend runs each operator of a network, its roofline cost and, with --measure, where time is lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path

import torch

import resfuse
from resfuse.backends.dispatch import PREFERENCE
from resfuse.cli import networks
from resfuse.explanation import WIDTH, Explanation
from resfuse.roofline import DEVICES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a network of torchvision, timm/NAME, resfuse/NAME or cifar_resnet20")
    add("--batch", type=int, default=1, metavar="N", help="images (default 1)")
    add("--size", type=int, metavar="PIXELS", help="height and width of the images (default: that of the network)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of model and images; with --training, by autocast")
    add("--device", help=f"{', '.join(DEVICES)}, which need not be there, or cuda or cpu (default: this machine's)")
    add("--training", "--train", action="store_true", help="a training step: batch statistics, forward and backward")
    add("--recompute", action="store_true", help="with --training: as after fuse_(recompute=True)")
    add("--measure", action="store_true", help="time each operator on this machine, and show where time is lost")
    add("--backend", choices=PREFERENCE, help="instead of automatic choice")
    add("--layers", choices=("slowest", "all"), default="slowest", help="equal ones together, the worst first; or all")
    add("--json", action="store_true", help="print everything, as JSON")
    add("--output", type=Path, metavar="FILE", help="write everything to a file, too, as JSON")


def run(args: argparse.Namespace) -> int:
    try:
        found = explain(args)
        data = json.dumps(found.to_dict(), indent=1)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(data + "\n")
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 1
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    print(data if args.json else found.table(every_layer=args.layers == "all", width=width))
    return 0


def explain(args: argparse.Namespace) -> Explanation:
    """The explanation that the arguments ask for.

    Raises:
        ModuleNotFoundError: the package of the model is not installed.
        RuntimeError, ValueError: see `resfuse.explain`; or there is no such model, or a number below one.
    """
    for name in ("batch", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    model, (channels, height, width) = networks.build(args.model)
    model.train(args.training)
    if args.size is not None:
        height = width = args.size
    dtype = DTYPES[args.dtype]
    casts: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if not args.training:
        model.to(dtype)
    elif dtype != torch.float32:
        casts = torch.autocast("cpu", dtype)  # the model, on the meta device, is traced as one on the CPU
    with casts:
        return resfuse.explain(
            model,
            (args.batch, channels, height, width),
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            measure=args.measure,
            backend=args.backend,
            recompute=args.recompute,
        )
