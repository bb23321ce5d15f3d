"""Compiles a ResNet's stem, for test_compile.py: needs a process in which Triton does not interpret.

Prints the kernel's name and the bytes of its narrowest asynchronous copy and of its narrowest load of elements.
"""

from __future__ import annotations

import re

import torch

from resfuse.backends.triton.config import ConvProblem
from tools.kernel_resources import DEVICES, compile_for, convolution_specs

TYPE = re.compile(r"(?:\.v(\d))?\.[bfu](\d+)$")


def width(instruction: str) -> int:
    """Bytes of ld.global.v4.b32."""
    found = TYPE.search(instruction)
    assert found is not None, instruction
    return int(found[1] or 1) * int(found[2]) // 8


def main() -> None:
    for arch in (80, 90):
        for kind, dtype in (("forward", torch.bfloat16), ("train", torch.bfloat16), ("forward", torch.float32)):
            precision = "tf32" if dtype == torch.float32 else "ieee"
            problem = ConvProblem(kind, dtype, 32, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), precision=precision)
            for spec in convolution_specs(problem, DEVICES[arch]):
                ptx = compile_for(spec, arch).asm["ptx"]
                copies = [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.\S+ [^;]*?, 0x(\w+)", ptx)]
                loads = [width(found) for found in re.findall(r"ld\.global(?!\S*acquire)\S*", ptx)]
                print(arch, dtype, spec.name, min(copies, default=0), min(loads, default=16))


if __name__ == "__main__":
    main()
