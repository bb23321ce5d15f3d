"""Convolutions of an image's few channels: from how many output pixels on a copy that is read faster is worth making.

The copies of input and weight are a small launch each.  Both numbers are estimates, not measured.
"""

PADDED_FROM = 1 << 15
"""With zeros behind the channels of a pixel (`cuda`, `triton`): for the 7x7 stem in bfloat16 it saves three quarters of
the loads of a kernel that loads most of its time."""

PACKED_FROM = 1 << 18
"""With all that a filter row reads in one pixel (`sm90`)."""
