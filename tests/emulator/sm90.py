"""The `sm90` backend's own Python and C++ code on CPU tensors, with its kernels executed by the emulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from resfuse.backends import sm90, stems
from tests.emulator import backend, build


def unavailable_reason() -> str | None:
    return build.sm90_unavailable_reason() or backend.unavailable_reason()


def __getattr__(name: str) -> Any:
    """Every kernel is the sm90 backend's."""
    return getattr(sm90, name)


@contextlib.contextmanager
def use_tile(channels: int, blocks: int) -> Iterator[None]:
    """Tiles of so many output channels, on a GPU of so many multiprocessors; any stem is packed."""
    with (
        mock.patch.object(stems, "PACKED_FROM", 0),
        mock.patch.object(sm90, "TILES", (channels,)),
        mock.patch.object(sm90, "processors_of", return_value=blocks),
        mock.patch.object(sm90, "planned", sm90.planned.__wrapped__),
        mock.patch.object(sm90, "_settings", sm90._settings.__wrapped__),
    ):
        yield
