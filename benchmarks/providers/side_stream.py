"""A CUDA stream for libraries that do not work, or not well, on the default one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Begins its work after what was queued on torch's current stream, which waits for it.

    So events on the current stream take its time, and both can be captured in one CUDA graph.  ONNX Runtime takes a
    stream of its own instead of the default one, whose address is zero, and TensorRT synchronises there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    @property
    def address(self) -> int:
        """As C has it: a cudaStream_t."""
        return self._stream.cuda_stream

    @contextmanager
    def ordered(self) -> Iterator[int]:
        """The context in which a library queues its work; gives the address."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        yield self.address
        current.wait_stream(self._stream)
