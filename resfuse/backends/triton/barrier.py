"""A barrier of all programs of a cooperative launch."""

import triton
import triton.language as tl


@triton.jit
def grid_barrier(barrier_ptr, num_programs):
    """Wait until all `num_programs` programs of the (one-dimensional) grid are here; what they wrote is then visible.

    The arrivals of one barrier add up to 2^31: program 0 adds 2^31 - (num_programs - 1), each of the others 1.  So the
    word's top bit flips with the last arrival, and the other bits are zero again: nothing to reset, and the next
    launch may have any number of programs.  (The way of cooperative groups' grid.sync.)

    Args:
        barrier_ptr: an int32, zero at first, that no other launch uses at the same time.
        num_programs: size of the grid.
    """
    before = arrive(barrier_ptr, num_programs)
    while not has_opened(tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu"), before):
        pass
    tl.debug_barrier()


@triton.jit
def arrive(barrier_ptr, num_programs):
    """Count this program in; what the word was before."""
    tl.debug_barrier()  # all threads have written before one of them releases
    arrival = tl.where(tl.program_id(0) == 0, -2147483648 - (num_programs - 1), 1)
    return tl.atomic_add(barrier_ptr, arrival, sem="release", scope="gpu")


@triton.jit
def has_opened(now, before):
    """Whether the last program has arrived between two readings of the word, the first of which is this program's."""
    return (now ^ before) < 0
