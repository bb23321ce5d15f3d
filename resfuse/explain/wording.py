"""What stands above and below the table of an explanation."""

from __future__ import annotations

from resfuse.explain.facts import Facts, Totals


def headline(explanation: Facts) -> str:
    """Model, mode, inputs and device."""
    inputs = ", ".join(
        f"{'x'.join(map(str, info.shape))} {str(info.dtype).removeprefix('torch.')}" for info in explanation.inputs
    )
    mode = "train()" if explanation.training else "eval()"
    passes = "forward and backward" if explanation.backward else "forward"
    return f"{explanation.model}, {mode}, {passes}, {inputs}, on {explanation.device.name}"


def summary(explanation: Facts) -> list[str]:
    """Totals, what fusing saves, and what is lost."""
    total, unfused, device = explanation.total, explanation.unfused, explanation.device
    lines = [_total_line("fused", total, device.launch), _total_line("unfused", unfused, device.launch)]
    lines.append(
        f"saved    {_saved(unfused.launches, total.launches)} of the launches, "
        f"{_saved(unfused.bytes, total.bytes)} of the bytes, {_saved(unfused.seconds, total.seconds)} of the least time"
        + (
            f", {_saved(unfused.measured, total.measured)} of the measured"
            if total.measured and unfused.measured
            else ""
        )
    )
    if total.lost is not None:
        lines.append(
            f"lost     {duration(total.lost)} above the least time, {number(total.lost / total.seconds + 1)} x it"
        )
    lines.append(f"ceilings {number(device.bandwidth / 1e9)} GB/s, {_rates(explanation)} ({device.source})")
    legend = "n: kernel launches; min: least time, by memory or arithmetic (math)"
    legend += "; lost: time above it" if total.measured is not None else ""
    return [*lines, legend]


def reasons(explanation: Facts) -> list[str]:
    """Which backend runs what, and why."""
    counts: dict[tuple[str, str, str], int] = {}
    for layer in explanation.layers:
        key = (layer.backend, layer.op, layer.reason)
        counts[key] = counts.get(key, 0) + 1
    grouped: dict[tuple[str, str], list[str]] = {}
    for (backend, op, reason), count in counts.items():
        grouped.setdefault((backend, reason), []).append(f"{op} x{count}" if count > 1 else op)
    lines = [f"{backend}: {', '.join(ops)}: {reason}" for (backend, reason), ops in grouped.items()]
    unknown = dict.fromkeys(layer.op for layer in explanation.layers if layer.estimated)
    if unknown:
        lines.append(f"estimated: {', '.join(unknown)}: no FLOPs, inputs and output once")
    return lines


def _total_line(name: str, total: Totals, launch: float) -> str:
    line = (
        f"{name:<8} {total.launches} launches, {number(total.flops / 1e9)} GFLOP, {number(total.bytes / 1e6)} MB, "
        f"at least {duration(total.seconds)}"
    )
    if launch:
        line += f" and {duration(total.launches * launch)} of launching"
    return line if total.measured is None else f"{line}, measured {duration(total.measured)}"


def _rates(explanation: Facts) -> str:
    dtypes = dict.fromkeys(layer.dtype for layer in explanation.layers if layer.flops)
    rates = (f"{number(explanation.device.rate(dtype) / 1e12)} TFLOP/s {str(dtype)[6:]}" for dtype in dtypes)
    return ", ".join(rates) or "no arithmetic"


def _saved(before: float, after: float) -> str:
    return f"{100 * (1 - after / before):.0f} %" if before else "0 %"


def duration(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms" if abs(seconds) >= 1e-3 else f"{number(seconds * 1e6)} us"


def number(value: float) -> str:
    """Three digits, no exponent."""
    if abs(value) < 5e-4:
        return "0"
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:.{places}f}"
