"""Triton kernels of attention with dropout of any length; `peftbench.kernels.long_attention` says what they compute.

A program of the forward pass and of the queries' gradient holds a block of queries and goes through the keys, one of
the keys' and values' gradients holds a block of keys and goes through the queries. Scores are kept in powers of two;
sums are fp32, and products take operands in the inputs' type.
"""

import triton
import triton.language as tl

from peftbench.kernels.dropout_triton import keeps, placed

NUMBERS = (
    *("heads", "shared", "queries", "keys", "scale", "p", "threshold", "site", "run_rows"),
    *("mask_n", "mask_h", "mask_t", "mask_k"),
)
"""Arguments that no kernel is compiled for: one serves every length."""
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-1e30)
"""Least finite mask: two such scores still have a difference."""
NO_MASK, ADDED, TRUTH = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def rows_of(t_ptr, stride, at, count, column, width: tl.constexpr, held: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return rows [at, held]; zeros past the last one, and past their width."""
    inside = (at < count)[:, None]
    if held != width:
        inside = inside & (column < width)[None, :]
    return tl.load(t_ptr + at[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def product(a, b, exact: tl.constexpr):  # type: ignore[no-untyped-def]
    if exact:
        found = tl.dot(a, b, input_precision="ieee")
    else:
        found = tl.dot(a, b)
    return found


@triton.jit
def scores(  # type: ignore[no-untyped-def]
    q, k, mask_ptr, mask_t, mask_k, query, key, queries, keys, scale,
    kind: tl.constexpr, by_query: tl.constexpr, causal: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """Return the scores [query, key] in fp32, times log₂ e; minus infinity where nothing is seen."""
    found = product(q, tl.trans(k), exact) * (scale * LOG2_E)
    seen = (key < keys)[None, :]
    if causal:
        seen = seen & (key[None, :] <= query[:, None])
    if kind != NO_MASK:
        if by_query:
            place = query.to(tl.int64)[:, None] * mask_t + key[None, :] * mask_k
            mask = tl.load(mask_ptr + place, mask=(query < queries)[:, None] & (key < keys)[None, :], other=0)
        else:
            mask = tl.load(mask_ptr + key * mask_k, mask=key < keys, other=0)[None, :]
        if kind == TRUTH:
            seen = seen & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            found += tl.where(mask == float("-inf"), mask, tl.maximum(mask, LEAST) * LOG2_E)
    return tl.where(seen, found, float("-inf"))


@triton.jit
def kept_shares(start, hash_key, line, query, key, queries, keys, threshold):  # type: ignore[no-untyped-def]
    """Return which shares [query, key] dropout keeps; `line`: which of its run's rows and heads this is."""
    first = (line.to(tl.uint32) * queries.to(tl.uint32) + query.to(tl.uint32)) * keys.to(tl.uint32)
    return keeps(first[:, None] + key.to(tl.uint32)[None, :], start, hash_key, threshold)


@triton.jit(do_not_specialize=NUMBERS)
def long_attention_forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, out_ptr, most_ptr, total_ptr,
    heads, shared, queries, keys, scale, p, threshold, site, run_rows,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, mask_n, mask_h, mask_t, mask_k,
    kind: tl.constexpr, by_query: tl.constexpr, causal: tl.constexpr, exact: tl.constexpr,
    width: tl.constexpr, held: tl.constexpr, block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    program, first = tl.program_id(0), tl.program_id(1) * block
    row, head = (program // heads).to(tl.int64), program % heads
    query, column = first + tl.arange(0, block), tl.arange(0, held)
    k_ptr += row * k_n + (head // shared) * k_h
    v_ptr += row * v_n + (head // shared) * v_h
    mask_ptr += row * mask_n + head * mask_h
    start, hash_key = placed(tl.load(seed_ptr + row // run_rows), site, 0 * head)
    line = (row % run_rows) * heads + head
    q = rows_of(q_ptr + row * q_n + head * q_h, q_t, query, queries, column, width, held)
    most = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    out = tl.zeros((block, held), tl.float32)
    end = keys
    if causal:
        end = tl.minimum(keys, first + block)
    for begin in range(0, end, key_block):
        key = begin + tl.arange(0, key_block)
        k = rows_of(k_ptr, k_t, key, keys, column, width, held)
        v = rows_of(v_ptr, v_t, key, keys, column, width, held)
        score = scores(q, k, mask_ptr, mask_t, mask_k, query, key, queries, keys, scale, kind, by_query, causal, exact)
        greatest = tl.maximum(most, tl.max(score, axis=1))
        # a query that has seen nothing yet has no difference of infinities
        finite = tl.where(greatest == float("-inf"), 0.0, greatest)
        power = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(most - finite)
        total = total * shrink + tl.sum(power, axis=1)
        power = tl.where(kept_shares(start, hash_key, line, query, key, queries, keys, threshold), power, 0.0)
        out = out * shrink[:, None] + product(power.to(v.dtype), v, exact)
        most = greatest
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.where(total == 0.0, 1.0, total)
    out *= (1.0 / (total * (1.0 - p)))[:, None]
    place = ((row * queries + query) * heads + head)[:, None] * width + column[None, :]
    inside = (query < queries)[:, None] & (column < width)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(most_ptr + program.to(tl.int64) * queries + query, most, mask=query < queries)
    tl.store(total_ptr + program.to(tl.int64) * queries + query, total, mask=query < queries)


@triton.jit(do_not_specialize=NUMBERS)
def long_attention_by_query(  # type: ignore[no-untyped-def]
    g_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, out_ptr, most_ptr, total_ptr, delta_ptr, dq_ptr,
    heads, shared, queries, keys, scale, p, threshold, site, run_rows,
    g_n, g_h, g_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, mask_n, mask_h, mask_t, mask_k,
    kind: tl.constexpr, by_query: tl.constexpr, causal: tl.constexpr, exact: tl.constexpr,
    width: tl.constexpr, held: tl.constexpr, block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """Write the queries' gradient, and what the other kernel needs of outputs and their gradient."""
    program, first = tl.program_id(0), tl.program_id(1) * block
    row, head = (program // heads).to(tl.int64), program % heads
    query, column = first + tl.arange(0, block), tl.arange(0, held)
    k_ptr += row * k_n + (head // shared) * k_h
    v_ptr += row * v_n + (head // shared) * v_h
    mask_ptr += row * mask_n + head * mask_h
    start, hash_key = placed(tl.load(seed_ptr + row // run_rows), site, 0 * head)
    line = (row % run_rows) * heads + head
    q = rows_of(q_ptr + row * q_n + head * q_h, q_t, query, queries, column, width, held)
    g = rows_of(g_ptr + row * g_n + head * g_h, g_t, query, queries, column, width, held)
    out = rows_of(out_ptr + (row * queries * heads + head) * width, heads * width, query, queries, column, width, held)
    # without dropout's factor, which comes last
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), axis=1) * (1.0 - p)
    place = program.to(tl.int64) * queries + query
    tl.store(delta_ptr + place, delta, mask=query < queries)
    most = tl.load(most_ptr + place, mask=query < queries, other=float("inf"))
    share_of = 1.0 / tl.load(total_ptr + place, mask=query < queries, other=1.0)
    dq = tl.zeros((block, held), tl.float32)
    end = keys
    if causal:
        end = tl.minimum(keys, first + block)
    for begin in range(0, end, key_block):
        key = begin + tl.arange(0, key_block)
        k = rows_of(k_ptr, k_t, key, keys, column, width, held)
        v = rows_of(v_ptr, v_t, key, keys, column, width, held)
        score = scores(q, k, mask_ptr, mask_t, mask_k, query, key, queries, keys, scale, kind, by_query, causal, exact)
        share = tl.exp2(score - most[:, None]) * share_of[:, None]
        keep = kept_shares(start, hash_key, line, query, key, queries, keys, threshold)
        by_share = tl.where(keep, product(g, tl.trans(v), exact), 0.0)
        by_score = share * (by_share - delta[:, None])
        dq += product(by_score.to(k.dtype), k, exact)
    place = ((row * queries + query) * heads + head)[:, None] * width + column[None, :]
    inside = (query < queries)[:, None] & (column < width)[None, :]
    tl.store(dq_ptr + place, (dq * (scale / (1.0 - p))).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def long_attention_by_key(  # type: ignore[no-untyped-def]
    g_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, most_ptr, total_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, shared, queries, keys, scale, p, threshold, site, run_rows,
    g_n, g_h, g_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, mask_n, mask_h, mask_t, mask_k,
    kind: tl.constexpr, by_query: tl.constexpr, causal: tl.constexpr, exact: tl.constexpr,
    width: tl.constexpr, held: tl.constexpr, block: tl.constexpr, key_block: tl.constexpr,
):  # fmt: skip
    """Write the gradients of keys and values, for each query head."""
    program, first = tl.program_id(0), tl.program_id(1) * key_block
    row, head = (program // heads).to(tl.int64), program % heads
    key, column = first + tl.arange(0, key_block), tl.arange(0, held)
    q_ptr += row * q_n + head * q_h
    g_ptr += row * g_n + head * g_h
    mask_ptr += row * mask_n + head * mask_h
    start, hash_key = placed(tl.load(seed_ptr + row // run_rows), site, 0 * head)
    line = (row % run_rows) * heads + head
    k = rows_of(k_ptr + row * k_n + (head // shared) * k_h, k_t, key, keys, column, width, held)
    v = rows_of(v_ptr + row * v_n + (head // shared) * v_h, v_t, key, keys, column, width, held)
    dk = tl.zeros((key_block, held), tl.float32)
    dv = tl.zeros((key_block, held), tl.float32)
    before = 0
    if causal:
        before = first // block * block
    for begin in range(before, queries, block):
        query = begin + tl.arange(0, block)
        q = rows_of(q_ptr, q_t, query, queries, column, width, held)
        g = rows_of(g_ptr, g_t, query, queries, column, width, held)
        place = program.to(tl.int64) * queries + query
        most = tl.load(most_ptr + place, mask=query < queries, other=float("inf"))
        share_of = 1.0 / tl.load(total_ptr + place, mask=query < queries, other=1.0)
        delta = tl.load(delta_ptr + place, mask=query < queries, other=0.0)
        score = scores(q, k, mask_ptr, mask_t, mask_k, query, key, queries, keys, scale, kind, by_query, causal, exact)
        share = tl.exp2(score - most[:, None]) * share_of[:, None]
        keep = kept_shares(start, hash_key, line, query, key, queries, keys, threshold)
        dv += product(tl.trans(tl.where(keep, share, 0.0).to(g.dtype)), g, exact)
        by_share = tl.where(keep, product(g, tl.trans(v), exact), 0.0)
        by_score = share * (by_share - delta[:, None])
        dk += product(tl.trans(by_score.to(q.dtype)), q, exact)
    place = ((row * keys + key) * heads + head)[:, None] * width + column[None, :]
    inside = (key < keys)[:, None] & (column < width)[None, :]
    tl.store(dv_ptr + place, (dv * (1.0 / (1.0 - p))).to(dv_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + place, (dk * (scale / (1.0 - p))).to(dk_ptr.dtype.element_ty), mask=inside)
