"""Per-channel building blocks of all kernels: batch statistics, the grid barrier, vectors over the channels.

Batch statistics are (count, mean, M2), M2 = sum (x - mean)^2, merged by Chan's formula in a fixed order (Chan, Golub,
LeVeque 1983, "Algorithms for computing the sample variance", (2.1)).  Counts are known from shapes, so only mean and M2
travel: in a float32 workspace [parts, 2, channels], one row of which each program of a reduction writes.

A part is `tiles_per_part` tiles (the last part may have fewer) of BLOCK_M positions; from tile `full_tiles` on a tile
has only `tail`.
"""

import triton
import triton.language as tl


@triton.jit
def part_counts(part, parts, tiles_per_part, tiles, full_tiles, tail, BLOCK_M: tl.constexpr):
    """Values per channel of each part, as float32; 0 for those from `parts` on."""
    first = tl.minimum(part * tiles_per_part, tiles)
    last = tl.minimum(first + tiles_per_part, tiles)
    full = tl.minimum(last, full_tiles) - tl.minimum(first, full_tiles)
    count = full.to(tl.float32) * BLOCK_M + (last - first - full).to(tl.float32) * tail
    return tl.where(part < parts, count, 0.0)


@triton.jit
def tile_statistics(x, valid, count):
    """(mean, M2) over the rows of a float32 tile, `count` of which are `valid` (a mask that broadcasts to the tile)."""
    centre = tl.sum(tl.where(valid, x, 0.0), axis=0) / count
    deviation = tl.where(valid, x - centre[None, :], 0.0)
    error = tl.sum(deviation, axis=0) / count  # of `centre`, which is as large as the mean and rounded accordingly
    return centre + error, tl.sum(deviation * deviation, axis=0) - count * error * error


@triton.jit
def merge_rows(mean, m2, counts):
    """(count, mean, M2) of the union of sets: each row of the tiles is one, with `counts` [rows, 1]."""
    count = tl.sum(counts)
    centre = tl.sum(mean * counts, axis=0) / count
    deviation = mean - centre[None, :]
    error = tl.sum(deviation * counts, axis=0) / count
    return count, centre + error, tl.sum(m2 + deviation * deviation * counts, axis=0) - count * error * error


@triton.jit
def affine(x, mean, scale, bias):
    """(x - mean) scale + bias per column: the arithmetic of forward, and of backward where it makes y again.

    The multiply-add is explicit, since both have to round alike.
    """
    return tl.fma(x - mean[None, :], scale[None, :], bias[None, :])


@triton.jit
def store_part(workspace_ptr, part, channels, column, mask, first, second):
    """Write the row of a part in the workspace: two values per channel."""
    row_ptr = workspace_ptr + part.to(tl.int64) * 2 * channels + column
    tl.store(row_ptr, first, mask)
    tl.store(row_ptr + channels, second, mask)


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """(count, mean, M2) of the union of two sets; the first may be empty."""
    total = count + other_count
    delta = other_mean - mean
    share = other_count / total
    return total, mean + delta * share, m2 + other_m2 + delta * delta * (count * share)


@triton.jit
def merge_parts(
    workspace_ptr, parts, channels, column, mask, tiles_per_part, tiles, full_tiles, tail,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2) of all parts of the workspace, for the channels `column` (a vector of BLOCK_N) under `mask`."""
    count, mean, m2 = 0.0, tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        part_ptr = workspace_ptr + part[:, None].to(tl.int64) * 2 * channels + column[None, :]
        inside = (part < parts)[:, None] & mask[None, :]
        means, m2s = tl.load(part_ptr, inside, other=0.0), tl.load(part_ptr + channels, inside, other=0.0)
        counts = part_counts(part, parts, tiles_per_part, tiles, full_tiles, tail, BLOCK_M)
        other_count, other_mean, other_m2 = merge_rows(means, m2s, counts[:, None])
        count, mean, m2 = merge(count, mean, m2, other_count, other_mean, other_m2)
    return count, mean, m2


@triton.jit
def sum_parts(workspace_ptr, parts, channels, column, mask, BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """The sums over all parts of the workspace, for the channels `column` (a vector of BLOCK_N) under `mask`."""
    first, second = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        part_ptr = workspace_ptr + part[:, None].to(tl.int64) * 2 * channels + column[None, :]
        inside = (part < parts)[:, None] & mask[None, :]
        first += tl.sum(tl.load(part_ptr, inside, other=0.0), axis=0)
        second += tl.sum(tl.load(part_ptr + channels, inside, other=0.0), axis=0)
    return first, second


@triton.jit
def inverse_deviation(variance, eps):
    """(variance + eps)^-1/2, rounded to nearest twice: the hardware's rsqrt is off by two units in the last place."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def update_running(mean_ptr, var_ptr, column, mask, mean, m2, count, momentum):
    """Update the running statistics (pointers may be None) in place; the variance is the unbiased one."""
    if mean_ptr is not None:
        running = tl.load(mean_ptr + column, mask).to(tl.float32)
        updated = running * (1 - momentum) + mean * momentum
        tl.store(mean_ptr + column, updated.to(mean_ptr.dtype.element_ty), mask)
    if var_ptr is not None:
        running = tl.load(var_ptr + column, mask).to(tl.float32)
        updated = running * (1 - momentum) + m2 / (count - 1) * momentum
        tl.store(var_ptr + column, updated.to(var_ptr.dtype.element_ty), mask)


@triton.jit
def per_channel(ptr, channels, mask, DEFAULT: tl.constexpr):
    """A vector over the channels, in float32; the default where the pointer is None."""
    if ptr is None:
        vector = tl.full(channels.shape, DEFAULT, tl.float32)
    else:
        vector = tl.load(ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return vector


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
    """Count this program in, and return the word as it was before."""
    tl.debug_barrier()  # all threads have written before one of them releases
    arrival = tl.where(tl.program_id(0) == 0, -2147483648 - (num_programs - 1), 1)
    return tl.atomic_add(barrier_ptr, arrival, sem="release", scope="gpu")


@triton.jit
def has_opened(now, before):
    """Whether the last program has arrived between two readings of the word, the first of which is this program's."""
    return (now ^ before) < 0
