"""Explain what runs where in a network, what it costs at least and, with --measure, where time is lost."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

import resfuse
from resfuse.backends.dispatch import PREFERENCE
from resfuse.cli import networks
from resfuse.costs import DEVICES
from resfuse.explain import Explanation, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a network of torchvision, timm/NAME, resfuse/NAME or cifar_resnet20")
    add("--batch", type=int, default=1, metavar="N", help="images (default 1)")
    add("--size", type=int, metavar="PIXELS", help="height and width of the images (default: what the network is for)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of model and images; with --train, by autocast")
    add("--device", help=f"{', '.join(DEVICES)}, which need not be there, or cuda or cpu (default: what is there)")
    add("--train", action="store_true", help="a training step: batch statistics, forward and backward")
    add("--measure", action="store_true", help="time each operator on this machine, and show where time is lost")
    add("--backend", choices=PREFERENCE, help="instead of automatic choice")
    add("--layers", choices=("slowest", "all"), default="slowest", help="equal ones together, the worst first; or all")
    add("--json", action="store_true", help="print everything, as JSON")
    add("--output", type=Path, metavar="FILE", help="write everything to a file, too, as JSON")


def run(args: argparse.Namespace) -> int:
    try:
        found = explain(args)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        show(found, every_layer=args.layers == "all")
    return 0


def explain(args: argparse.Namespace) -> Explanation:
    """What the arguments ask for.

    Raises:
        ModuleNotFoundError: the package of the model is not installed.
        RuntimeError, ValueError: see `resfuse.explain`; or there is no such model, or a number below one.
    """
    for name in ("batch", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    model, (channels, *sizes) = networks.build(args.model)
    model.train(args.train)
    dtype = DTYPES[args.dtype]
    height, width = sizes if args.size is None else (args.size, args.size)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    casts: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if not args.train:
        model.to(dtype)
    elif dtype != torch.float32:
        casts = torch.autocast("cpu", dtype)  # where the tracer's tensors are
    with casts:
        return resfuse.explain(
            model,
            (args.batch, channels, height, width),
            device=args.device or here,
            measure=args.measure,
            backend=args.backend,
        )


def show(found: Explanation, every_layer: bool) -> None:
    """Print the table, in colours where that is possible."""
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        width = shutil.get_terminal_size((table.WIDTH, 24)).columns
        print(table.text(found, every_layer=every_layer, width=max(min(width, table.WIDTH), table.NARROWEST)))
        return
    from rich.console import Console

    Console(highlight=False).print(table.Rich(found, every_layer))
