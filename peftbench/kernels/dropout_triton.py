"""Triton kernel of dropout by a hash, and the hash; `peftbench.kernels.dropout` says what they compute."""

import triton
import triton.language as tl


@triton.jit
def scrambled(x, key):  # type: ignore[no-untyped-def]
    """Return numbers of 32 bits whose upper bits depend on all of x: the middle of Wellons' hash "lowbias32"."""
    x = x * 0x7FEB352D + key
    x ^= x >> 15
    return x * 0x846CA68B


@triton.jit
def placed(seed, site, part):  # type: ignore[no-untyped-def]
    """Return where the numbers of a seed, a site and a part of it begin, and their key."""
    start = scrambled(seed.to(tl.uint32) ^ part.to(tl.uint32), (seed >> 32).to(tl.uint32))
    start = scrambled(start ^ (start >> 16), site.to(tl.uint32))
    return start, scrambled(start ^ (start >> 16), 1)


@triton.jit
def keeps(place, start, key, threshold):  # type: ignore[no-untyped-def]
    """Return whether dropout keeps what is at a place."""
    return scrambled(place.to(tl.uint32) + start, key).to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=("site", "threshold", "scale"))
def dropout(  # type: ignore[no-untyped-def]
    x_ptr, seed_ptr, out_ptr, thresholds, scales, site, count, threshold, scale,
    by_run: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1)
    if by_run:
        threshold = tl.load(thresholds + run)
        scale = tl.load(scales + run)
    start, key = placed(tl.load(seed_ptr + run), site + 0 * run, 0 * run)
    place = tl.program_id(0) * block + tl.arange(0, block)
    at = run.to(tl.int64) * count + place
    x = tl.load(x_ptr + at, mask=place < count, other=0.0)
    kept = tl.where(keeps(place, start, key, threshold), x.to(tl.float32) * scale, 0.0)
    tl.store(out_ptr + at, kept.to(out_ptr.dtype.element_ty), mask=place < count)
