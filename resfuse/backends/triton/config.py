"""GPUs, convolution problems, and the configurations for them, ranked by a model of their time.

The model knows what a tile reads, multiplies and writes, and how many tiles a multiprocessor has at a time.  It is
meant to find the right order of candidates, not their times.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import torch

from resfuse.backends.integers import cdiv, power_of_two_above

Kind = Literal["forward", "train"]
Precision = Literal["ieee", "tf32"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (BLOCK_M, BLOCK_N, num_warps) whose accumulators, with a residual in the epilogue, stay in registers.  wgmma wants 64
# rows per group of four warps.
TENSOR_CORE_TILES = (
    (64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8),
    (128, 16, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8),
    (256, 64, 8),
)  # fmt: skip
FMA_TILES = ((32, 16, 4), (32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8))
MAX_SPLIT_K = 256
MAX_REGISTERS = 255

# Per multiprocessor, by compute capability: floating-point operations per ns of bf16 and of fp32 outside tensor cores.
_FLOPS = {8: (2900.0, 180.0), 9: (7500.0, 500.0), 10: (15000.0, 500.0)}
_L2_BYTES = 80.0  # per ns and multiprocessor
_LOAD_LATENCY = 700.0  # ns, from global memory
_TILE_OVERHEAD = 1000.0  # ns: addresses, the first loads and the epilogue's latency
_SLACK = 1024  # bytes of shared memory, for sums over a tile
_RAGGED_ELEMENTS = 32  # of a tile, that a thread can load one by one without spilling their addresses
_MEETING = 2000.0  # ns, of the programs that share a tile


class DeviceProperties(NamedTuple):
    """The properties of a GPU that plans depend on."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_memory: int  # bytes that one program can have
    registers: int = 65536  # per multiprocessor, as the next one; the same from sm_80 to sm_100
    warps: int = 64
    interpreted: bool = False
    """Programs run one after another, so they cannot wait for each other, and a large tile costs little more."""

    def resident_programs(self, num_warps: int, registers: int | None = None, shared_memory: int = 0) -> int:
        """Programs certain to be on the device at the same time: the most that a grid barrier may wait for.

        Given are upper bounds for a program; `registers` None means as many as let one run on a multiprocessor.
        """
        per_sm = 1
        if registers is not None:
            per_sm = min(self.registers // (32 * num_warps * cdiv(registers, 8) * 8), self.warps // num_warps)
            if shared_memory:
                per_sm = min(per_sm, self.shared_memory // (shared_memory + 1024))
        return max(1, per_sm) * self.num_sms


H100 = DeviceProperties("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
A100 = DeviceProperties("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)
INTERPRETER = DeviceProperties("Triton's interpreter", (9, 0), 3, 232448, interpreted=True)


@functools.cache
def cuda_properties(device: torch.device) -> DeviceProperties:
    """The properties of a GPU of this machine."""
    gpu: Any = torch.cuda.get_device_properties(device)
    capability, memory = (gpu.major, gpu.minor), gpu.shared_memory_per_block_optin
    return DeviceProperties(gpu.name, capability, gpu.multi_processor_count, memory)


class ConvProblem(NamedTuple):
    """A forward convolution (N, C, H, W) x (K, C/groups, R, S) as one implicit GEMM per group.

    GEMM M = N*OH*OW, N = K/groups, K = R*S*C/groups.  The kind "train" has batch statistics behind it.
    """

    kind: Kind
    dtype: torch.dtype
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    precision: Precision = "ieee"  # for float32 only; the other dtypes are multiplied in one way
    residual: bool = False  # which the epilogue adds: it tells measurements apart, not configurations

    @property
    def oh(self) -> int:
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def taps(self) -> int:
        return self.r * self.s

    @property
    def group_in(self) -> int:
        """Input channels of a group."""
        return self.c // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of a group."""
        return self.k // self.groups

    @property
    def gemm(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return self.n * self.oh * self.ow, self.group_out, self.taps * self.group_in

    @property
    def uses_tensor_cores(self) -> bool:
        return self.dtype != torch.float32 or self.precision == "tf32"


class ConvConfig(NamedTuple):
    """The tiling of a convolution.  A step of the main loop takes `block_k` channels of one filter tap."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1  # programs that share the steps of a tile
    group_m: int = 8  # tiles of M for which consecutive programs share a tile of N, so that both stay in L2
    persistent: bool = False
    """As many programs as are resident, each with several tiles, instead of one program per tile."""

    def tiles(self, problem: ConvProblem) -> tuple[int, int]:
        """(tiles of M, tiles of N and all groups)."""
        return cdiv(problem.gemm[0], self.block_m), problem.groups * cdiv(problem.group_out, self.block_n)

    def steps(self, problem: ConvProblem) -> int:
        """Steps that the channels of one tap take, shared by `split_k` programs."""
        return cdiv(problem.group_in, self.block_k)

    def shared_memory(self, problem: ConvProblem) -> int:
        """Upper bound in bytes: a tile of both operands per stage, and room for an epilogue."""
        elements = (self.block_m + self.block_n) * self.block_k * self.num_stages + self.block_m * self.block_n
        return elements * problem.dtype.itemsize + _SLACK


def every_config(problem: ConvProblem, device: DeviceProperties) -> list[ConvConfig]:
    """All configurations that heuristics, tables and `tune` may choose for a problem, in a fixed order."""
    per_load = 16 // problem.dtype.itemsize
    ragged = problem.group_in % per_load != 0 or problem.group_out % per_load != 0
    sums = 32 if problem.dtype == torch.float32 else 64  # of a thread; beside a float32 residual there is less room
    found = []
    for block_m, block_n, num_warps in TENSOR_CORE_TILES if problem.uses_tensor_cores else FMA_TILES:
        threads = 32 * num_warps
        if block_n > max(16, power_of_two_above(problem.group_out)) or block_m * block_n > sums * threads:
            continue
        for block_k in _block_ks(problem):
            if ragged and max(block_m, block_n) * block_k > _RAGGED_ELEMENTS * threads:
                continue
            for num_stages in (2, 3, 4):
                tile = ConvConfig(block_m, block_n, block_k, num_warps, num_stages)
                if tile.shared_memory(problem) <= device.shared_memory:
                    found += _variants(problem, tile, device)
    return found


def ranked(problem: ConvProblem, device: DeviceProperties) -> list[ConvConfig]:
    """`every_config`, fastest first by the model: the best variant of every tile, then the second-best ones."""
    of_tile: dict[tuple[int, ...], list[tuple[float, ConvConfig]]] = {}
    for config in every_config(problem, device):
        of_tile.setdefault(config[:3], []).append((modelled_time(problem, config, device), config))
    places = [
        (place, *variant)
        for variants in of_tile.values()
        for place, variant in enumerate(sorted(variants, key=lambda variant: variant[0]))
    ]
    return [config for _, _, config in sorted(places, key=lambda item: item[:2])]


def heuristic_config(problem: ConvProblem, device: DeviceProperties) -> ConvConfig:
    """The configuration to use where no table has a measured one."""
    return min(every_config(problem, device), key=lambda config: modelled_time(problem, config, device))


def occupancy(problem: ConvProblem, config: ConvConfig, device: DeviceProperties) -> int:
    """Programs that one multiprocessor holds at a time, estimated."""
    threads = 32 * config.num_warps
    registers = min(MAX_REGISTERS, 2 * config.block_m * config.block_n // threads + 100)
    by_memory = device.shared_memory // config.shared_memory(problem)
    return max(1, min(device.registers // (registers * threads), by_memory, device.warps // config.num_warps))


def modelled_time(problem: ConvProblem, config: ConvConfig, device: DeviceProperties) -> float:
    """Nanoseconds of the multiprocessor that has the most to do."""
    size = problem.dtype.itemsize
    output = config.block_m * config.block_n
    programs = math.prod(config.tiles(problem)) * config.split_k
    per_multiprocessor = cdiv(programs, device.num_sms)
    rounds = cdiv(per_multiprocessor, occupancy(problem, config, device))
    steps = cdiv(config.steps(problem), config.split_k)
    # The loops are nested, and the pipeline ends with the innermost: that over the channels of a tap, or, where they
    # are one step, over the taps of a row of the filter.
    waits = problem.taps if steps > 1 else problem.r
    steps *= problem.taps
    multiply = 2 * output * config.block_k / (_flops(problem, device) * _efficiency(problem, config))
    load = (config.block_m + config.block_n) * config.block_k * size / _L2_BYTES
    throughput = per_multiprocessor * steps * max(multiply, load)
    latency = rounds * _LOAD_LATENCY * (waits + (steps - waits) / (config.num_stages - 1))
    store = per_multiprocessor * output * (size if config.split_k == 1 else 4) / _L2_BYTES
    overhead = rounds * _TILE_OVERHEAD * (0.7 if config.persistent else 1)
    time = max(throughput, latency) + store + overhead
    if config.split_k > 1:
        time += _MEETING + programs * output * 4 / (_L2_BYTES * device.num_sms)
    return time


def _efficiency(problem: ConvProblem, config: ConvConfig) -> float:
    """Fraction of the peak: narrow tiles read more of their operands per multiplication from shared memory."""
    if problem.uses_tensor_cores:
        return config.block_n / (config.block_n + 32)
    side = math.sqrt(config.block_m * config.block_n / (32 * config.num_warps))  # of a thread's part, were it square
    return side / (side + 2)


def _flops(problem: ConvProblem, device: DeviceProperties) -> float:
    bf16, fp32 = _FLOPS[min(max(device.capability[0], min(_FLOPS)), max(_FLOPS))]
    if problem.dtype != torch.float32:
        return bf16
    return bf16 / 2 if problem.precision == "tf32" else fp32


def _variants(problem: ConvProblem, tile: ConvConfig, device: DeviceProperties) -> list[ConvConfig]:
    """A tile alone, with its main loop split, and with persistent programs."""
    found = [tile]
    if problem.kind == "train":  # batch statistics need whole sums
        return found
    steps, tiles = tile.steps(problem), math.prod(tile.tiles(problem))
    split_k = 2
    while split_k <= min(MAX_SPLIT_K, steps) and tiles * split_k <= 8 * device.num_sms:
        if (split_k - 1) * cdiv(steps, split_k) < steps:  # every part has work
            found.append(tile._replace(split_k=split_k))
        split_k *= 2
    resident = device.num_sms * occupancy(problem, tile, device)
    if tiles > 2 * resident and problem.taps * steps <= 4:
        found.append(tile._replace(persistent=True))
    return found


def _block_ks(problem: ConvProblem) -> tuple[int, ...]:
    """Widths of a main loop's step: as much as 128 bytes per row, no more than the (padded) channels of one tap."""
    if not problem.uses_tensor_cores:
        return (16,)
    widest = 32 if problem.dtype == torch.float32 else 64
    block_k = min(widest, max(16, power_of_two_above(problem.group_in)))
    return (block_k, block_k // 2) if block_k == 64 else (block_k,)
