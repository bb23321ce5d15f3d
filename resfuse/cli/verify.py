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
from torch.overrides import BaseTorchFunctionMode

import resfuse
from resfuse import contract
from resfuse.backends import dispatch, first_contact
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
    faults = first_contact_faults(backends, dtypes) if device.type == "cuda" else 0
    findings = _verify_ops(backends, args.op or list(cases.KERNELS), dtypes)
    if model is not None:
        for dtype in (torch.float32, torch.bfloat16):
            compared = list(_verify_model(*model, dtype))
            _print_table(f"{args.model}, fused by resfuse.fuse_, on {device.type}, {_name(dtype)}", compared)
            findings += compared
    return max(_conclude(findings, time.perf_counter() - started), faults)


def first_contact_faults(backends: Sequence[str], dtypes: Sequence[torch.dtype]) -> int:
    """Make the checks of a first contact again, and print them; 1 where one leaves out a kernel or cannot be made."""
    faults = False
    for name, dtype in itertools.product((name for name in backends if name in first_contact.KERNEL_FILES), dtypes):
        if dtype not in dispatch.backend(name).DTYPES:
            continue
        try:
            verdicts = first_contact.verdicts(name, dtype, torch.cuda.current_device(), "force")
            faults |= any(verdicts.values())
            told = first_contact.described(verdicts)
        except first_contact.UnsettledError as error:
            faults, told = True, f"could not be checked: {error}"
        print(f"first contact, {name}, {_name(dtype)}: {told}")
    return int(faults)


def _verify_ops(backends: Sequence[str], ops: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Finding]:
    """Run every case in every mode and memory format, and print a table for each device, dtype and backend."""
    findings: list[Finding] = []
    skipped: dict[str, set[str]] = {}
    chosen = [case for case in cases.CASES if case.op in ops]
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device, dtype in itertools.product(devices, dtypes):
        if device.type == "cpu" and dtype == torch.float16:
            continue  # which is for GPUs
        here = [name for name in backends if name == "reference" or (name == "cpu") == (device.type == "cpu")]
        by_backend: dict[str, list[Finding]] = {name: [] for name in here}
        for number, case in enumerate(chosen, 1):
            if sys.stderr.isatty():
                print(f"\r{_name(dtype)}: {number} of {len(chosen)}", end="\r", file=sys.stderr, flush=True)
            able = []
            for name in here:
                reasons = case.unsupported_reasons(name, device, dtype)
                able += [] if reasons else [name]
                for reason in reasons:
                    skipped.setdefault(reason, set()).add(f"{case.op} on {name}")
            for training in ((True, False) if case.op != "add_relu" else (True,)) if able else ():
                for name, finding in _verify_case(case, able, device, dtype, training):
                    by_backend[name].append(finding)
        for name, found in by_backend.items():
            if found:
                _print_table(f"{name} backend on {device.type}, {_name(dtype)}", found)
            findings += found
    for reason, names in skipped.items():
        print(f"not run: {', '.join(sorted(names))}: {reason}")
    return findings


def _verify_case(
    case: cases.Case, backends: Sequence[str], device: torch.device, dtype: torch.dtype, training: bool
) -> Iterator[tuple[str, Finding]]:
    """The findings of all backends in both memory formats; one that raises is a violation, and stops no other."""
    module, inputs, grad_output = case.build(device, dtype)
    convolution = case.op == "conv_bn_act"
    if case.activation == "relu":
        linear, (input, *rest) = copy.deepcopy(module).double().train(training), (one.double() for one in inputs)
        linear.act = nn.Identity()
        with torch.no_grad(), BaseTorchFunctionMode():
            preactivation = linear(input, *rest) if case.op != "add_relu" else input + rest[0]
        rounding = contract.rounding_of(dtype, device, convolution=convolution)
        grad_output = grad_output.masked_fill(contract.decided_by_rounding(preactivation, rounding), 0)
    floor = contract.floor_of(dtype, device, convolution=convolution)
    comparison = _Comparison(module, inputs, grad_output, training, floor)
    for name, channels_last in itertools.product(backends, (False, True)):
        layout, mode = "channels_last" if channels_last else "NCHW", "training" if training else "inference"
        title = f"{case.op}, {case.name} {case.shape}, {mode}, {layout}"
        try:
            with resfuse.use_backend(name):
                found = comparison.deviations(module, channels_last)
        except Exception as error:
            message = f"raised {type(error).__name__}: {error}"
            found = [Deviation(message.partition("\n")[0], *[math.nan] * 6)]
        yield from ((name, (title, deviation)) for deviation in found)


class _Comparison:
    """The true results of a module and eager's, with which its fused results are compared.

    Eager runs under a TorchFunctionMode, for which fused modules call PyTorch's own operators.
    """

    def __init__(
        self, module: nn.Module, inputs: list[Tensor], grad_output: Tensor | None, training: bool, floor: float
    ) -> None:
        self.inputs, self.grad_output, self.training, self.floor = inputs, grad_output, training, floor
        self.dtype = inputs[0].dtype
        wide = [tensor.double() for tensor in inputs]
        with BaseTorchFunctionMode():
            grad = None if grad_output is None else grad_output.double()
            self.exact = _results(copy.deepcopy(module).double(), wide, grad, training, False)
            self.eager = [_results(module, inputs, grad_output, training, format) for format in (False, True)]

    def deviations(self, module: nn.Module, channels_last: bool = True) -> list[Deviation]:
        fused = _results(module, self.inputs, self.grad_output, self.training, channels_last)
        found = []
        for name, exact in self.exact.items():
            scale = None
            if name == "grad conv_bias" and self.training and self.grad_output is not None:
                # Batch statistics cancel a constant, so this gradient is zero but for rounding: it is measured
                # against the terms that cancel.
                scale = torch.linalg.vector_norm(self.grad_output.double()).item()
            eager = [results[name] for results in self.eager]
            found.append(contract.measure(name, fused[name], eager, exact, self.dtype, floor=self.floor, scale=scale))
        return found


def _results(
    module: nn.Module, inputs: list[Tensor], grad_output: Tensor | None, training: bool, channels_last: bool
) -> dict[str, Tensor]:
    """The output, all gradients of a `grad_output` and, in training, each kind of running statistic in one vector."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module = copy.deepcopy(module).train(training).to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = [tensor.detach().clone(memory_format=memory_format).requires_grad_() for tensor in inputs]
    with torch.set_grad_enabled(grad_output is not None):
        output = module(*inputs)
    found = {"output": output.detach()}
    if grad_output is not None:
        leaves = dict(zip(("input", "residual"), inputs, strict=False))
        leaves |= {name.removeprefix("bn.").replace(".", "_"): one for name, one in module.named_parameters()}
        grads = torch.autograd.grad(output, list(leaves.values()), grad_output.contiguous(memory_format=memory_format))
        found |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    for statistic in ("running_mean", "running_var") if training else ():
        buffers = [buffer.flatten() for name, buffer in module.named_buffers() if name.endswith(statistic)]
        found |= {statistic: torch.cat(buffers)} if buffers else {}
    return found


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
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            momenta[module], module.momentum = module.momentum, 1.0  # the statistics of this batch alone
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    # Small images are enough, but not for every network (a ViT).
    for size in {(min(height, 96), min(width, 96)): None, (height, width): None}:
        images = torch.randn(8, channels, *size, generator=torch.Generator().manual_seed(0))
        try:
            output = model.to(device).train()(images.to(device))
            break
        except (AssertionError, RuntimeError, ValueError) as error:
            failure = error
    else:
        raise ValueError(f"model: {name} cannot be run on images of {height}x{width}: {failure}") from failure
    if not isinstance(output, Tensor):
        raise ValueError(f"model: expected a network whose output is a tensor, {name} returns {type(output).__name__}")
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model, (1.5 * images.flip(2) + 0.5).to(device)


def _verify_model(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Iterator[Finding]:
    """Compare the output and the running statistics of the fused network with those of the eager one."""
    eager, images = copy.deepcopy(model).to(dtype), images.to(dtype)
    fused = copy.deepcopy(eager)
    resfuse.fuse_(fused)
    floor = contract.floor_of(dtype, images.device, convolution=True)
    for training in (True, False):
        mode = f"model, {_name(dtype)}, {'training' if training else 'inference'}"
        comparison = _Comparison(eager, [images], None, training, floor)
        yield from ((mode, deviation) for deviation in comparison.deviations(fused))


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
