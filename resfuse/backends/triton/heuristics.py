"""Which configurations a problem allows on a device, and a model of their time that ranks them until they are measured.

The model knows what a tile reads, multiplies and writes, and how many tiles a multiprocessor has at a time.  It is
meant to find the right order of candidates, not their times.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from resfuse.backends.integers import cdiv, power_of_two_above
from resfuse.backends.triton.devices import DeviceProperties
from resfuse.backends.triton.problems import ConvConfig, ConvProblem

# (BLOCK_M, BLOCK_N, num_warps) whose accumulators, with a residual in the epilogue, stay in registers.  wgmma wants 64
# rows per group of four warps.  DESIGN.md, section 6, has the registers; tests/test_triton_compile.py watches them.
TENSOR_CORE_TILES = (
    (64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8),
    (128, 16, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8),
    (256, 64, 8),
)  # fmt: skip
FMA_TILES = ((32, 16, 4), (32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8))
MAX_SPLIT_K = 256

# Per multiprocessor, by compute capability: floating-point operations per ns of bf16 and of fp32 outside tensor cores.
_FLOPS = {8: (2900.0, 180.0), 9: (7500.0, 500.0), 10: (15000.0, 500.0)}
_L2_BYTES = 80.0  # per ns and multiprocessor
_LOAD_LATENCY = 700.0  # ns, from global memory
_TILE_OVERHEAD = 1000.0  # ns: addresses, the first loads and the epilogue's latency
_SLACK = 1024  # bytes of shared memory, for sums over a tile
_RAGGED_ELEMENTS = 32  # of a tile, that a thread can load one by one without spilling their addresses
_MEETING = 2000.0  # ns, of the programs that share a tile


def every_config(problem: ConvProblem, device: DeviceProperties) -> list[ConvConfig]:
    """All configurations that heuristics, tables and `tune` may choose for a problem, in a fixed order."""
    block_ks = _block_ks(problem)
    found = []
    for block_m, block_n, num_warps in TENSOR_CORE_TILES if problem.uses_tensor_cores else FMA_TILES:
        if block_n > max(16, power_of_two_above(_width(problem))):
            continue
        if block_m * block_n > _most_sums(problem) * 32 * num_warps:
            continue
        for block_k in block_ks:
            if _is_ragged(problem) and max(block_m, block_n) * block_k > _RAGGED_ELEMENTS * 32 * num_warps:
                continue
            for num_stages in (2, 3, 4):
                tile = ConvConfig(block_m, block_n, block_k, num_warps, num_stages)
                if shared_memory(problem, tile) <= device.shared_memory:
                    found += _variants(problem, tile, device)
    return found


def ranked(problem: ConvProblem, device: DeviceProperties) -> list[ConvConfig]:
    """`every_config`, fastest first by the model: the best variant of every tile, then the second-best ones."""
    of_tile: dict[tuple[int, int, int], list[tuple[float, ConvConfig]]] = {}
    for config in every_config(problem, device):
        variants = of_tile.setdefault((config.block_m, config.block_n, config.block_k), [])
        variants.append((modelled_time(problem, config, device), config))
    for variants in of_tile.values():
        variants.sort(key=lambda variant: variant[0])
    places = [(place, *variant) for variants in of_tile.values() for place, variant in enumerate(variants)]
    return [config for _, _, config in sorted(places, key=lambda item: item[:2])]


@functools.lru_cache(maxsize=4096)
def heuristic_config(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    """The configuration to use where no table has a measured one."""
    return min(every_config(problem, device), key=lambda config: modelled_time(problem, config, device))


def shared_memory(problem: ConvProblem, config: ConvConfig) -> int:
    """Bytes of shared memory, at most.

    Each stage holds a tile of both operands.  Where dz is computed while it is loaded, all but the current stage have
    dy, z, y and five vectors instead.  Kernels with several tiles per program also keep room for an epilogue.
    """
    size = problem.dtype.itemsize
    first, second = config.block_m * config.block_k * size, config.block_n * config.block_k * size
    if problem.kind in ("dgrad", "wgrad"):
        computed = (config.num_stages - 1) * (3 * first + 5 * 4 * config.block_k) + first
        partial_sums = config.block_m * config.block_n * 4
        return max(computed + second * config.num_stages, partial_sums) + _SLACK
    return (first + second) * config.num_stages + config.block_m * config.block_n * size + _SLACK


def tiles(problem: ConvProblem, config: ConvConfig) -> int:
    """Output tiles of all groups; a tile of wgrad belongs to one filter tap."""
    columns = cdiv(_width(problem), config.block_n) * (problem.taps if problem.kind == "wgrad" else 1)
    return cdiv(problem.gemm_m, config.block_m) * columns * problem.groups


def loop_taps(problem: ConvProblem) -> int:
    """Filter taps that the main loop of a tile goes through."""
    if problem.kind == "wgrad":
        return 1
    if problem.kind == "dgrad":  # a pixel of a strided convolution's input meets only the taps of its own phase
        return cdiv(problem.r, problem.stride[0]) * cdiv(problem.s, problem.stride[1])
    return problem.taps


def split_steps(problem: ConvProblem, config: ConvConfig) -> int:
    """Steps of the main loop that `split_k` programs share: forward convolutions split the channels of every tap."""
    steps = cdiv(_step_extent(problem), config.block_k)
    return steps if problem.kind in ("forward", "train") else loop_taps(problem) * steps


def loop_steps(problem: ConvProblem, config: ConvConfig) -> int:
    """Steps of the main loop of one program."""
    steps = cdiv(split_steps(problem, config), config.split_k)
    return loop_taps(problem) * steps if problem.kind in ("forward", "train") else steps


def loop_starts(problem: ConvProblem, config: ConvConfig) -> int:
    """How often a program waits for a first load: the loops are nested, and the pipeline ends with the innermost.

    That is the loop over the channels of a tap, or, where they are one step, over the taps (of a row of the filter).
    """
    if problem.kind == "wgrad":
        return 1
    steps = cdiv(cdiv(_step_extent(problem), config.block_k), config.split_k)
    if problem.kind == "dgrad":
        return loop_taps(problem) if steps > 1 else 1
    return loop_taps(problem) if steps > 1 else problem.r


def occupancy(problem: ConvProblem, config: ConvConfig, device: DeviceProperties) -> int:
    """Programs that one multiprocessor holds at a time."""
    threads = 32 * config.num_warps
    registers = min(255, 2 * config.block_m * config.block_n // threads + 100)
    limits = (
        device.registers // (registers * threads),
        device.shared_memory // shared_memory(problem, config),
        device.warps // config.num_warps,
    )
    return max(1, min(limits))


def modelled_time(problem: ConvProblem, config: ConvConfig, device: DeviceProperties) -> float:
    """Nanoseconds, of the multiprocessor that has the most to do."""
    size = problem.dtype.itemsize
    output = config.block_m * config.block_n
    tile_count = tiles(problem, config)
    programs = tile_count * config.split_k
    per_multiprocessor = cdiv(programs, device.num_sms)
    rounds = cdiv(per_multiprocessor, occupancy(problem, config, device))
    steps = loop_steps(problem, config)
    multiply = 2 * output * config.block_k / (_flops(problem, device) * _efficiency(problem, config))
    load = (config.block_m + config.block_n) * config.block_k * size / _L2_BYTES
    throughput = per_multiprocessor * steps * max(multiply, load)
    waits = loop_starts(problem, config)
    latency = rounds * _LOAD_LATENCY * (waits + (steps - waits) / (config.num_stages - 1))
    store = per_multiprocessor * output * (size if config.split_k == 1 else 4) / _L2_BYTES
    overhead = rounds * _TILE_OVERHEAD * (0.7 if config.persistent else 1)
    time = max(throughput, latency) + store + overhead
    if config.split_k > 1:
        time += _MEETING + programs * output * 4 / (_L2_BYTES * device.num_sms)
    return time


def _efficiency(problem: ConvProblem, config: ConvConfig) -> float:
    """What a tile leaves of the peak: narrow ones read more of their operands per multiplication from shared memory."""
    if problem.uses_tensor_cores:
        return config.block_n / (config.block_n + 32)
    side = math.sqrt(config.block_m * config.block_n / (32 * config.num_warps))  # of a thread's part, were it square
    return side / (side + 2)


def _variants(problem: ConvProblem, tile: ConvConfig, device: DeviceProperties) -> list[ConvConfig]:
    """A tile alone, with its main loop split, and with persistent programs."""
    found = [tile]
    steps = split_steps(problem, tile)
    if problem.kind != "train":  # batch statistics need whole sums
        split_k = 2
        while split_k <= min(MAX_SPLIT_K, steps) and tiles(problem, tile) * split_k <= 8 * device.num_sms:
            if (split_k - 1) * cdiv(steps, split_k) < steps:  # every part has work
                found.append(dataclasses.replace(tile, split_k=split_k))
            split_k *= 2
    resident = device.num_sms * occupancy(problem, tile, device)
    if problem.kind == "forward" and tiles(problem, tile) > 2 * resident and loop_steps(problem, tile) <= 4:
        found.append(dataclasses.replace(tile, persistent=True))
    return found


def _block_ks(problem: ConvProblem) -> tuple[int, ...]:
    """Widths of a main loop's step: as much as 128 bytes per row, no more than the (padded) channels of one tap."""
    if not problem.uses_tensor_cores:
        return (16,)
    widest = 32 if problem.dtype == torch.float32 else 64
    block_k = min(widest, max(16, power_of_two_above(_step_extent(problem))))
    return (block_k, block_k // 2) if block_k == 64 else (block_k,)


def _most_sums(problem: ConvProblem) -> int:
    """Sums that a thread can hold; beside a residual in float32 there is room for fewer."""
    return 32 if problem.dtype == torch.float32 and problem.kind in ("forward", "train") else 64


def _is_ragged(problem: ConvProblem) -> bool:
    """Whether the channels next to each other in memory do not fill loads of 16 bytes."""
    per_load = 16 // problem.dtype.itemsize
    return problem.group_in % per_load != 0 or problem.group_out % per_load != 0


def _step_extent(problem: ConvProblem) -> int:
    """What the steps of a tap cover: channels, or the pixels that wgrad sums over."""
    return problem.gemm_k if problem.kind == "wgrad" else problem.gemm_k // problem.taps


def _width(problem: ConvProblem) -> int:
    """The channels that BLOCK_N tiles: those of one tap."""
    return problem.group_in if problem.kind == "wgrad" else problem.gemm_n


def _flops(problem: ConvProblem, device: DeviceProperties) -> float:
    known = min(max(device.capability[0], min(_FLOPS)), max(_FLOPS))
    bf16, fp32 = _FLOPS[known]
    if problem.dtype != torch.float32:
        return bf16
    return bf16 / 2 if problem.precision == "tf32" else fp32
