"""Triton kernels of attention on short sequences; `peftbench.kernels.attention` says what they compute."""

import triton
import triton.language as tl


@triton.jit
def shares(  # type: ignore[no-untyped-def]
    q, k, bias_ptr, bias_row, row, keys, scale, biased: tl.constexpr, exact: tl.constexpr, length: tl.constexpr
):
    """Return the softmax [T, T'] in fp32; keys past the last have none of it."""
    key = tl.arange(0, length)
    if exact:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    else:
        scores = tl.dot(q, tl.trans(k)) * scale
    if biased:
        scores += tl.load(bias_ptr + row * bias_row + key, mask=key < keys, other=0.0).to(tl.float32)[None, :]
    scores = tl.where((key < keys)[None, :], scores, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def kept(  # type: ignore[no-untyped-def]
    seed_ptr, program, p, rounds: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr
):
    """Return what the softmax is multiplied by, 0 or 1 / (1 − p): the same at every call with one seed."""
    place = (program * queries + tl.arange(0, queries))[:, None] * keys + tl.arange(0, keys)[None, :]
    return tl.where(tl.rand(tl.load(seed_ptr), place, rounds) >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, seed_ptr, out_ptr, heads, queries, keys, scale, p,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, bias_row,
    biased: tl.constexpr, dropped: tl.constexpr, exact: tl.constexpr, rounds: tl.constexpr,
    width: tl.constexpr, queries_held: tl.constexpr, keys_held: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, head = (program // heads).to(tl.int64), program % heads
    query, key, column = tl.arange(0, queries_held)[:, None], tl.arange(0, keys_held)[:, None], tl.arange(0, width)
    q = tl.load(q_ptr + row * q_n + head * q_h + query * q_t + column, mask=query < queries, other=0.0)
    k = tl.load(k_ptr + row * k_n + head * k_h + key * k_t + column, mask=key < keys, other=0.0)
    v = tl.load(v_ptr + row * v_n + head * v_h + key * v_t + column, mask=key < keys, other=0.0)
    share = shares(q, k, bias_ptr, bias_row, row, keys, scale, biased, exact, keys_held)
    if dropped:
        share *= kept(seed_ptr, program, p, rounds, queries_held, keys_held)
    if exact:
        out = tl.dot(share, v, input_precision="ieee")
    else:
        out = tl.dot(share.to(v.dtype), v)
    place = ((row * queries + query) * heads + head) * width + column
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=query < queries)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr, heads, queries, keys, scale, p,
    g_n, g_h, g_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, bias_row,
    biased: tl.constexpr, dropped: tl.constexpr, exact: tl.constexpr, rounds: tl.constexpr,
    width: tl.constexpr, queries_held: tl.constexpr, keys_held: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, head = (program // heads).to(tl.int64), program % heads
    query, key, column = tl.arange(0, queries_held)[:, None], tl.arange(0, keys_held)[:, None], tl.arange(0, width)
    g = tl.load(g_ptr + row * g_n + head * g_h + query * g_t + column, mask=query < queries, other=0.0)
    q = tl.load(q_ptr + row * q_n + head * q_h + query * q_t + column, mask=query < queries, other=0.0)
    k = tl.load(k_ptr + row * k_n + head * k_h + key * k_t + column, mask=key < keys, other=0.0)
    v = tl.load(v_ptr + row * v_n + head * v_h + key * v_t + column, mask=key < keys, other=0.0)
    share = shares(q, k, bias_ptr, bias_row, row, keys, scale, biased, exact, keys_held)
    key_place = ((row * keys + key) * heads + head) * width + column
    used = share
    if exact:
        by_share = tl.dot(g, tl.trans(v), input_precision="ieee")
    else:
        by_share = tl.dot(g, tl.trans(v))
    if dropped:
        factor = kept(seed_ptr, program, p, rounds, queries_held, keys_held)
        used = share * factor
        by_share *= factor
    if exact:
        dv = tl.dot(tl.trans(used), g, input_precision="ieee")
    else:
        dv = tl.dot(tl.trans(used.to(g.dtype)), g)
    tl.store(dv_ptr + key_place, dv.to(dv_ptr.dtype.element_ty), mask=key < keys)
    by_score = share * (by_share - tl.sum(share * by_share, axis=1)[:, None]) * scale
    if exact:
        dq = tl.dot(by_score, k, input_precision="ieee")
        dk = tl.dot(tl.trans(by_score), q, input_precision="ieee")
    else:
        by_score = by_score.to(q.dtype)
        dq = tl.dot(by_score, k)
        dk = tl.dot(tl.trans(by_score), q)
    place = ((row * queries + query) * heads + head) * width + column
    tl.store(dq_ptr + place, dq.to(dq_ptr.dtype.element_ty), mask=query < queries)
    tl.store(dk_ptr + key_place, dk.to(dk_ptr.dtype.element_ty), mask=key < keys)
