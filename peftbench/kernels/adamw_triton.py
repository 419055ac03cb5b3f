"""Triton kernels of AdamW over a pack; `peftbench.kernels.adamw` says what they compute."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(256)
"""Elements that share a scale in 8 bits."""


@triton.jit(do_not_specialize=("runs",))
def prepare(  # type: ignore[no-untyped-def]
    norm_ptr, loss_ptr, clip_ptr, alive_ptr, table_ptr, row_ptr, number_ptr, runs, held: tl.constexpr
):
    """Freeze runs that are no longer finite, and write the others' numbers.

    Those are [4, R]: the gradient's factor, η, η / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ).
    """
    run = tl.arange(0, held)
    inside = run < runs
    norm = tl.load(norm_ptr + run, mask=inside, other=0.0)
    loss = tl.load(loss_ptr + run, mask=inside, other=0.0)
    alive = tl.load(alive_ptr + run, mask=inside, other=0) != 0
    alive = alive & (tl.abs(norm) < float("inf")) & (tl.abs(loss) < float("inf"))  # false for what is no number
    shrink = tl.minimum(tl.load(clip_ptr + run, mask=inside, other=1.0) / (norm + 1e-6), 1.0)
    line = table_ptr + tl.load(row_ptr) * (5 * runs) + run
    tl.store(alive_ptr + run, alive.to(tl.uint8), mask=inside)
    tl.store(number_ptr + run, tl.where(alive, shrink, 0.0), mask=inside)
    tl.store(number_ptr + runs + run, tl.where(alive, tl.load(line, mask=inside, other=0.0), 0.0), mask=inside)
    scaled = tl.load(line + 3 * runs, mask=inside, other=0.0)
    tl.store(number_ptr + 2 * runs + run, tl.where(alive, scaled, 0.0), mask=inside)
    tl.store(number_ptr + 3 * runs + run, tl.load(line + 4 * runs, mask=inside, other=0.0), mask=inside)


@triton.jit
def changed(  # type: ignore[no-untyped-def]
    flat, g, mean, square, number_ptr, recipe_ptr, run, runs, decay, ratio, decays: tl.constexpr, scales: tl.constexpr
):
    """Return parameters and both moments after a step with the clipped gradient g."""
    # 1 − β₁, β₂, 1 − β₂ and ε
    mean = mean + (g - mean) * tl.load(recipe_ptr + run)
    square = square * tl.load(recipe_ptr + runs + run) + g * g * tl.load(recipe_ptr + 2 * runs + run)
    root = tl.sqrt(square) * tl.load(number_ptr + 3 * runs + run) + tl.load(recipe_ptr + 3 * runs + run)
    update = mean * tl.load(number_ptr + 2 * runs + run)
    if scales:
        update = update * ratio
    if decays:
        decay = decay * tl.load(number_ptr + runs + run)
        if scales:
            decay = decay * ratio
        flat = flat - decay * flat
    return flat - update / root, mean, square


@triton.jit
def clipped(grad_ptr, at, inside, number_ptr, run):  # type: ignore[no-untyped-def]
    """Return the gradient as the run's clipping leaves it, zero for a frozen run."""
    shrink = tl.load(number_ptr + run)
    return tl.where(shrink > 0, tl.load(grad_ptr + at, mask=inside, other=0.0) * shrink, 0.0)


@triton.jit(do_not_specialize=("runs", "decay_row"))
def update(  # type: ignore[no-untyped-def]
    grad_ptr, flat_ptr, mean_ptr, square_ptr, number_ptr, recipe_ptr, decay_ptr, ratio_ptr, kept_ptr,
    runs, columns, decay_row,
    decays: tl.constexpr, scales: tl.constexpr, keeps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Update parameters and moments in fp32, all [R, N]."""
    run, column = tl.program_id(1), tl.program_id(0) * block + tl.arange(0, block)
    inside, at = column < columns, tl.program_id(1).to(tl.int64) * columns + column
    g = clipped(grad_ptr, at, inside, number_ptr, run)
    if keeps:
        tl.store(kept_ptr + at, g, mask=inside)
    decay, ratio = 0.0, 1.0
    if decays:
        decay = tl.load(decay_ptr + run.to(tl.int64) * decay_row + column, mask=inside, other=0.0)
    if scales:
        ratio = tl.load(ratio_ptr + at, mask=inside, other=1.0)
    flat = tl.load(flat_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    flat, mean, square = changed(flat, g, mean, square, number_ptr, recipe_ptr, run, runs, decay, ratio, decays, scales)
    tl.store(flat_ptr + at, flat, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)


@triton.jit
def coded(x, code_ptr, scale_ptr, bound_ptr, at, inside, block, whole):  # type: ignore[no-untyped-def]
    """Store blocks of x [any, 256] in 8 bits: a scale each, and for each element how many boundaries lie below it."""
    most = tl.max(tl.abs(x), axis=1)
    scaled = x * (1.0 / most)[:, None]
    code = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(8):
        beyond = code + (128 >> i)
        code = tl.where(scaled > tl.load(bound_ptr + beyond - 1), beyond, code)
    code = tl.where(most[:, None] == 0, 0, code)
    tl.store(code_ptr + at, code.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + block, most, mask=whole)


@triton.jit(do_not_specialize=("runs", "decay_row"))
def update_8bit(  # type: ignore[no-untyped-def]
    grad_ptr, flat_ptr, mean_ptr, square_ptr, mean_scale, square_scale, mean_map, square_map, mean_bound, square_bound,
    number_ptr, recipe_ptr, decay_ptr, ratio_ptr, kept_ptr, runs, columns, decay_row,
    decays: tl.constexpr, scales: tl.constexpr, keeps: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """Update parameters, and moments in 8 bits; rows are whole blocks."""
    run = tl.program_id(1)
    count = columns // BLOCK
    own = tl.program_id(0) * blocks + tl.arange(0, blocks)
    whole, block = own < count, run.to(tl.int64) * count + own
    column = own[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, at = column < columns, run.to(tl.int64) * columns + column
    g = clipped(grad_ptr, at, inside, number_ptr, run)
    if keeps:
        tl.store(kept_ptr + at, g, mask=inside)
    decay, ratio = 0.0, 1.0
    if decays:
        decay = tl.load(decay_ptr + run.to(tl.int64) * decay_row + column, mask=inside, other=0.0)
    if scales:
        ratio = tl.load(ratio_ptr + at, mask=inside, other=1.0)
    flat = tl.load(flat_ptr + at, mask=inside, other=0.0)
    mean = tl.load(mean_map + tl.load(mean_ptr + at, mask=inside, other=0).to(tl.int32))
    mean = mean * tl.load(mean_scale + block, mask=whole, other=0.0)[:, None]
    square = tl.load(square_map + tl.load(square_ptr + at, mask=inside, other=0).to(tl.int32))
    square = square * tl.load(square_scale + block, mask=whole, other=0.0)[:, None]
    flat, mean, square = changed(flat, g, mean, square, number_ptr, recipe_ptr, run, runs, decay, ratio, decays, scales)
    tl.store(flat_ptr + at, flat, mask=inside)
    coded(mean, mean_ptr, mean_scale, mean_bound, at, inside, block, whole)
    coded(square, square_ptr, square_scale, square_bound, at, inside, block, whole)
