"""Integer arithmetic of grids and blocks.  (Triton has its own, which takes ten times as long on the host.)"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return cdiv(value, multiple) * multiple


def power_of_two_above(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


def power_of_two_below(value: int) -> int:
    """The greatest power of two that is not above `value`."""
    return 1 << (value.bit_length() - 1)
