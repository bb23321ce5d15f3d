"""What a convolution kernel has to compute, and how: the two records that heuristics, tables and kernels exchange."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import torch

Kind = Literal["forward", "train", "dgrad", "wgrad"]
Precision = Literal["ieee", "tf32"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class ConvProblem:
    """One convolution (N, C, H, W) x (K, C/groups, R, S), or one of its gradients, as an implicit GEMM per group.

    | kind           | GEMM M    | GEMM N           | GEMM K           |
    |----------------|-----------|------------------|------------------|
    | forward, train | N*OH*OW   | K/groups         | R*S*C/groups     |
    | dgrad          | N*H*W     | C/groups         | R*S*K/groups     |
    | wgrad          | K/groups  | R*S*C/groups     | N*OH*OW          |
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
    precision: Precision = "ieee"
    """Of float32 only; the other dtypes have one way of being multiplied."""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Computed once: a launch looks several things up by its problem."""
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

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
    def gemm_m(self) -> int:
        if self.kind == "wgrad":
            return self.group_out
        return self.n * (self.h * self.w if self.kind == "dgrad" else self.oh * self.ow)

    @property
    def gemm_n(self) -> int:
        if self.kind == "wgrad":
            return self.taps * self.group_in
        return self.group_in if self.kind == "dgrad" else self.group_out

    @property
    def gemm_k(self) -> int:
        if self.kind == "wgrad":
            return self.n * self.oh * self.ow
        return self.taps * (self.group_out if self.kind == "dgrad" else self.group_in)

    @property
    def uses_tensor_cores(self) -> bool:
        return self.dtype != torch.float32 or self.precision == "tf32"


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """The compile-time parameters of a convolution kernel.

    Tiles are BLOCK_M x BLOCK_N of the GEMM.  One step of the main loop takes BLOCK_K channels of one filter tap
    (pixels, for wgrad); BLOCK_N never spans two taps.  `split_k` programs share the steps of a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8
    """Tiles of M that consecutive programs share a tile of N for, so that both stay in L2."""
    persistent: bool = False
    """As many programs as are resident, each with several tiles, instead of one program per tile."""
