"""Triton kernels of attention on short sequences; `peftbench.kernels.attention` says what they compute.

Scores are kept in powers of two, and what is the same for a whole row (the softmax's denominator, dropout's factor)
is multiplied in where a row is shortest: these kernels wait for arithmetic by element, not for memory.
"""

import triton
import triton.language as tl

from peftbench.kernels.dropout_triton import keeps, placed

NUMBERS = ("queries", "keys", "scale", "p", "threshold", "site", "run_programs", "bias_row")
"""Arguments that no kernel is compiled for: one serves every length that it holds."""
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)
"""Least bias: two such scores still have a difference."""


@triton.jit
def scores(  # type: ignore[no-untyped-def]
    q, k, bias_ptr, bias_row, row, keys, scale, biased: tl.constexpr, exact: tl.constexpr, length: tl.constexpr
):
    """Return the scores [T, T'] in fp32, times log₂ e; minus infinity past the last key."""
    key = tl.arange(0, length)
    if exact:
        found = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        found = tl.dot(q, tl.trans(k))
    if biased:
        bias = tl.load(bias_ptr + row * bias_row + key, mask=key < keys, other=0.0).to(tl.float32)
        bias = tl.where(key < keys, tl.maximum(bias, LEAST) * LOG2_E, float("-inf"))
    else:
        bias = tl.where(key < keys, 0.0, float("-inf"))
    return found * (scale * LOG2_E) + bias[None, :]


@triton.jit
def kept_shares(seed_ptr, program, run_programs, site, first, threshold, queries: tl.constexpr, keys: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which shares dropout keeps [queries, keys], from query `first` on; with one seed always the same."""
    start, key = placed(tl.load(seed_ptr + program // run_programs), site, program % run_programs)
    place = (first + tl.arange(0, queries))[:, None] * keys + tl.arange(0, keys)[None, :]
    return keeps(place, start, key, threshold)


@triton.jit(do_not_specialize=NUMBERS)
def short_attention_forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, seed_ptr, out_ptr, log_ptr,
    heads, queries, keys, scale, p, threshold, site, run_programs,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, bias_row,
    biased: tl.constexpr, dropped: tl.constexpr, exact: tl.constexpr,
    width: tl.constexpr, block: tl.constexpr, keys_held: tl.constexpr,
):  # fmt: skip
    program, first = tl.program_id(0), tl.program_id(1) * block
    row, head = (program // heads).to(tl.int64), program % heads
    at = first + tl.arange(0, block)
    query, key, column = at[:, None], tl.arange(0, keys_held)[:, None], tl.arange(0, width)
    q = tl.load(q_ptr + row * q_n + head * q_h + query * q_t + column, mask=query < queries, other=0.0)
    k = tl.load(k_ptr + row * k_n + head * k_h + key * k_t + column, mask=key < keys, other=0.0)
    v = tl.load(v_ptr + row * v_n + head * v_h + key * v_t + column, mask=key < keys, other=0.0)
    score = scores(q, k, bias_ptr, bias_row, row, keys, scale, biased, exact, keys_held)
    most = tl.max(score, axis=1)
    power = tl.exp2(score - most[:, None])
    total = tl.sum(power, axis=1)
    factor = 1.0 / total
    if dropped:
        power = tl.where(
            kept_shares(seed_ptr, program, run_programs, site, first, threshold, block, keys_held), power, 0.0
        )
        factor /= 1.0 - p
    if exact:
        out = tl.dot(power, v, input_precision="ieee")
    else:
        out = tl.dot(power.to(v.dtype), v)
    place = ((row * queries + query) * heads + head) * width + column
    tl.store(out_ptr + place, (out * factor[:, None]).to(out_ptr.dtype.element_ty), mask=query < queries)
    tl.store(log_ptr + program.to(tl.int64) * queries + at, most + tl.log2(total), mask=at < queries)


@triton.jit(do_not_specialize=NUMBERS)
def short_attention_backward(  # type: ignore[no-untyped-def]
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, seed_ptr, log_ptr, dq_ptr, dk_ptr, dv_ptr,
    heads, queries, keys, scale, p, threshold, site, run_programs,
    g_n, g_h, g_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, bias_row,
    biased: tl.constexpr, dropped: tl.constexpr, exact: tl.constexpr,
    width: tl.constexpr, block: tl.constexpr, keys_held: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, head = (program // heads).to(tl.int64), program % heads
    key, column = tl.arange(0, keys_held)[:, None], tl.arange(0, width)
    k = tl.load(k_ptr + row * k_n + head * k_h + key * k_t + column, mask=key < keys, other=0.0)
    v = tl.load(v_ptr + row * v_n + head * v_h + key * v_t + column, mask=key < keys, other=0.0)
    dk = tl.zeros((keys_held, width), tl.float32)
    dv = tl.zeros((keys_held, width), tl.float32)
    factor = 1.0 / (1.0 - p)
    for first in range(0, queries, block):
        at = first + tl.arange(0, block)
        query = at[:, None]
        g = tl.load(g_ptr + row * g_n + head * g_h + query * g_t + column, mask=query < queries, other=0.0)
        q = tl.load(q_ptr + row * q_n + head * q_h + query * q_t + column, mask=query < queries, other=0.0)
        log = tl.load(log_ptr + program.to(tl.int64) * queries + at, mask=at < queries, other=0.0)
        score = scores(q, k, bias_ptr, bias_row, row, keys, scale, biased, exact, keys_held)
        share = tl.exp2(score - log[:, None])
        if exact:
            by_share = tl.dot(g, tl.trans(v), input_precision="ieee")
        else:
            by_share = tl.dot(g, tl.trans(v))
        used = share
        if dropped:
            keep = kept_shares(seed_ptr, program, run_programs, site, first, threshold, block, keys_held)
            used = tl.where(keep, share, 0.0)
            by_share = tl.where(keep, by_share, 0.0)
        by_score = share * (by_share - tl.sum(share * by_share, axis=1)[:, None])
        # dropout's factor and the scores' scale come last, by row of the gradients
        if exact:
            dv += tl.dot(tl.trans(used), g, input_precision="ieee")
            dq = tl.dot(by_score, k, input_precision="ieee")
            dk += tl.dot(tl.trans(by_score), q, input_precision="ieee")
        else:
            dv += tl.dot(tl.trans(used.to(g.dtype)), g)
            by_score = by_score.to(q.dtype)
            dq = tl.dot(by_score, k)
            dk += tl.dot(tl.trans(by_score), q)
        place = ((row * queries + query) * heads + head) * width + column
        tl.store(dq_ptr + place, (dq * (scale * factor)).to(dq_ptr.dtype.element_ty), mask=query < queries)
    place = ((row * keys + key) * heads + head) * width + column
    tl.store(dv_ptr + place, (dv * factor).to(dv_ptr.dtype.element_ty), mask=key < keys)
    tl.store(dk_ptr + place, (dk * (scale * factor)).to(dk_ptr.dtype.element_ty), mask=key < keys)
