"""Fixtures of the tests of backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def convolutions() -> Iterator[Any]:
    """Torch's switch for TF32, whose `fp32_precision` a test may set ("ieee" to begin with)."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    yield switch
    switch.fp32_precision = before
