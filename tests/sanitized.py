"""The program that compute-sanitizer watches: `python -m tests.sanitized cuda` launches every kernel on small problems.

`python -m tests.sanitized triton bfloat16 float32` does so for Triton's kernels, in two of the three dtypes.

No PyTorch kernel of any size runs beside them: tensors are made and compared on the CPU, and the gradients of
convolutions, which are cuDNN's, are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from resfuse.backends import cuda, dispatch
from tests.emulator.cases import cases


def main(backend: str, dtypes: Iterable[torch.dtype] = cuda.DTYPES) -> int:
    reason = dispatch.backend(backend).unavailable_reason()
    if reason is not None:
        print(reason)
        return 2
    count = 0
    for count, (name, case) in enumerate(cases(backend, dtypes), 1):  # noqa: B007
        try:
            case()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    print(f"{count} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]] or cuda.DTYPES))
