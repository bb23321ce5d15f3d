"""`resfuse verify`: hold every backend of this machine against the numerical contract; exit code 1 for a violation."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import resfuse
from resfuse import contract
from resfuse.backends import dispatch
from resfuse.cli import cases, networks
from resfuse.contract import Deviation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULE = (
    f"E(fused) <= {contract.FACTOR:g} E(eager) + floor, worst element <= {contract.ELEMENT_FACTOR:g} x eager's, "
    "both against float64"
)
Finding = tuple[str, Deviation]
"""A description of a run, and one of its deviations."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", action="append", choices=dispatch.PREFERENCE, help="only this (repeatable)")
    parser.add_argument("--op", action="append", choices=tuple(cases.KERNELS), help="only this (repeatable)")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="only this (repeatable)")
    parser.add_argument(
        "--model", metavar="NAME", help="also compare a network, fused: resnet50 (torchvision), timm/NAME, resfuse/NAME"
    )


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = _calibrated(args.model, device) if args.model else None
    except (ModuleNotFoundError, ValueError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 1
    unavailable = dispatch.unavailable_reasons()
    wanted = args.backend or list(dispatch.PREFERENCE)
    for name in wanted:
        if unavailable[name] is not None:
            print(f"{name} is skipped: {unavailable[name]}")
    backends = [name for name in wanted if unavailable[name] is None]
    dtypes = [DTYPES[name] for name in args.dtype or DTYPES]
    findings = _verify_ops(list(cases.runs(backends, args.op or list(cases.KERNELS), dtypes)))
    if model is not None:
        for dtype in (torch.float32, torch.bfloat16):
            compared = list(_verify_model(*model, dtype))
            _print_table(f"{args.model}, fused by resfuse.fuse_, on {device.type}, {_name(dtype)}", compared)
            findings += compared
    return _conclude(findings, time.perf_counter() - started)


def _verify_ops(runs: Sequence[cases.Run]) -> list[Finding]:
    """Run everything and print a table for each device, dtype and backend as soon as it is complete."""
    findings: list[Finding] = []
    skipped: dict[str, set[str]] = {}
    done = itertools.count(1)
    for (device, dtype), group in itertools.groupby(runs, key=lambda run: (run.device, run.dtype)):
        by_backend: dict[str, list[Finding]] = {}
        for run in group:
            if sys.stderr.isatty():
                print(f"\r{next(done)} of {len(runs)}", end="\r", file=sys.stderr, flush=True)
            reasons = run.unsupported_reasons()
            for reason in reasons:
                skipped.setdefault(reason, set()).add(f"{run.case.op} on {run.backend}")
            if not reasons:
                by_backend.setdefault(run.backend, []).extend(_findings(run))
        for backend, found in by_backend.items():
            _print_table(f"{backend} backend on {device.type}, {_name(dtype)}", found)
            findings += found
    for reason, names in skipped.items():
        print(f"not run: {', '.join(sorted(names))}: {reason}")
    return findings


def _findings(run: cases.Run) -> list[Finding]:
    """The deviations of a run; a backend that raises is a violation, and does not stop the others."""
    try:
        return [(str(run), deviation) for deviation in run.deviations()]
    except Exception as error:
        message = f"raised {type(error).__name__}: {error}"
        return [(str(run), Deviation(message.partition("\n")[0], *[math.nan] * 6))]


@torch.no_grad()
def _calibrated(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms have random affine parameters and the statistics of a batch, and other images for it.

    The 0 and 1 of fresh batch norms would hide mistakes, and so would statistics that are those of the images already.
    Dropout is switched off, for its mask depends on the memory format.

    Raises:
        ModuleNotFoundError, ValueError: see `networks.build`; or the output is not a tensor.
    """
    torch.manual_seed(0)
    model, (channels, height, width) = networks.build(name, meta=False)
    images = torch.randn(8, channels, min(height, 96), min(width, 96), generator=torch.Generator().manual_seed(0))
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            momenta[module], module.momentum = module.momentum, None  # None: the statistics of this batch alone
            module.reset_running_stats()
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    output = model.to(device).train()(images.to(device))
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected a network whose output is a tensor, {name} returns {type(output).__name__}")
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model, (1.5 * images.flip(2) + 0.5).to(device)


def _verify_model(eager: nn.Module, images: Tensor, dtype: torch.dtype) -> Iterator[Finding]:
    """Compare the output and the running statistics of the fused network with those of the eager one."""
    eager, images = copy.deepcopy(eager).to(dtype), images.to(dtype)
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    channels_last: nn.Module = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    permuted = images.contiguous(memory_format=torch.channels_last)
    floor = contract.floor_of(dtype, images.device, convolution=True)
    for training in (True, False):
        found = _results(fused, permuted, training)
        with resfuse.use_backend("reference"):  # the networks of resfuse.models are made of fused modules
            exact = _results(copy.deepcopy(eager).double(), images.double(), training)
            eagers = [_results(eager, images, training), _results(channels_last, permuted, training)]
        for name in exact:
            references = [result[name] for result in eagers]
            mode = f"model, {_name(dtype)}, {'training' if training else 'inference'}"
            yield mode, contract.measure(name, found[name], references, exact[name], dtype, floor=floor)


@torch.no_grad()
def _results(model: nn.Module, images: Tensor, training: bool) -> dict[str, Tensor]:
    """The output and, in training, each kind of running statistic in one vector; the model itself does not change."""
    model = copy.deepcopy(model).train(training)
    found = {"output": model(images)}
    for statistic in ("running_mean", "running_var") if training else ():
        buffers = [buffer.flatten() for name, buffer in model.named_buffers() if name.endswith(statistic)]
        found |= {statistic: torch.cat(buffers)} if buffers else {}
    return found


def _print_table(title: str, findings: Sequence[Finding]) -> None:
    """The worst finding of every quantity of every op."""
    worst: dict[tuple[str, str], Deviation] = {}
    for name, deviation in findings:
        key = (name.partition(",")[0], deviation.quantity)
        worst[key] = max(worst.get(key, deviation), deviation, key=lambda one: one.used)
    print(f"\n{title}\n  {'op':<12} {'quantity':<18}{'E(fused)':>10}{'E(eager)':>10}{'limit':>10}{'used':>8}")
    for (op, quantity), found in sorted(worst.items(), key=lambda item: item[0][0]):
        errors = "".join(f"{value:10.1e}" for value in (found.fused, found.eager, found.limit))
        print(f"  {op:<12} {quantity:<18.40}{errors}{found.used:8.0%}{'  VIOLATION' if found.violated else ''}")


def _conclude(findings: Sequence[Finding], seconds: float) -> int:
    violations = [finding for finding in findings if finding[1].violated]
    for name, deviation in violations:
        print(f"violation: {name}\n  {deviation}")
    if not findings:
        print("Nothing could be compared.")
        return 1
    if violations:
        print(f"\n{len(violations)} of {len(findings)} comparisons break the contract: {RULE}.")
        return 1
    print(f"\nAll {len(findings)} comparisons keep the contract ({seconds:.0f} s): {RULE}.")
    return 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
