"""Kernels as Triton compiles them: listed without running any, and compiled for GPUs that are not here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class KernelSpec(NamedTuple):
    """A kernel with everything that Triton compiles it by, and how it is launched."""

    kernel: Any
    signature: dict[str, str]
    """Parameter -> Triton's name of its type ("*bf16", "i32", "fp32"), or "constexpr"."""
    constants: dict[str, Any]
    """Values of the parameters that are "constexpr"; None for pointers that are absent, 1 for integers that are 1."""
    aligned: tuple[str, ...]
    """Pointers and integers that are multiples of 16."""
    num_warps: int
    num_stages: int
    cooperative: bool
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self, capability: int) -> Any:
        """Triton's CompiledKernel for compute capability 80, 90, ...; needs no GPU, and TRITON_INTERPRET unset."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        index = {name: (i,) for i, name in enumerate(self.signature)}
        source = ASTSource(
            self.kernel,
            self.signature,
            {index[name]: value for name, value in self.constants.items()},
            {index[name]: [["tt.divisibility", 16]] for name in self.aligned},
        )
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "launch_cooperative_grid": self.cooperative,
        }
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def spec_of(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    cooperative: bool,
) -> KernelSpec:
    """What `launch` would launch with these arguments."""
    signature, compiled_in, aligned = {}, {}, []
    for name, value in zip(kernel.arg_names, (*args, *constants.values()), strict=True):
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            compiled_in[name] = constants.get(name, value)
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.is_meta or value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    names = kernel.arg_names[len(args) :]
    assert list(constants) == names, f"{kernel.__name__}: constants {list(constants)} for parameters {names}"
    return KernelSpec(kernel, signature, compiled_in, tuple(aligned), num_warps, num_stages, cooperative, grid)
