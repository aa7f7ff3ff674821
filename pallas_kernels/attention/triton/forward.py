"""out and log2 of the sums of a block of queries: online softmax over blocks of keys (Dao, 2023, arXiv 2307.08691).

A program has BLOCK_Q queries of one head. It visits the keys from its first query's start to its last query: what lies
before, other examples of a packed row or tokens outside a window, is not read.
"""

import triton
import triton.language as tl

from pallas_kernels.attention.triton.scores import LOG2E, MASKED, load_rows, scored, store_rows


@triton.jit
def forward_kernel(
    q,  # [B, T, N, H]
    k,  # [B, T, K, H]
    v,
    starts,  # int32 [B, T], or None
    slopes,  # float32 [N], or None
    sinks,  # float32 [N], or None
    out,  # [B, T, N, H]
    log_sums,  # float32 [B, N, T]: log2 of what the exponentials sum up to
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_H: tl.constexpr,  # the next power of two from H
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = (tl.program_id(0) // N).to(tl.int64)
    head = tl.program_id(0) % N
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q  # those with the most keys begin first
    rows, h = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    keys = tl.arange(0, BLOCK_K)
    k += batch * T * K * H + head // (N // K) * H
    v += batch * T * K * H + head // (N // K) * H
    place = batch * T * N * H + head * H
    q_tile = load_rows(q + place, rows, N * H, h, T, H, BLOCK_H)
    begin, start, slope = 0, rows, None
    if starts is not None:
        begin = tl.load(starts + batch * T + first) // BLOCK_K * BLOCK_K
        start = tl.load(starts + batch * T + rows, mask=rows < T, other=0)
    if slopes is not None:
        slope = tl.load(slopes + head)
    most = tl.full((BLOCK_Q,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if sinks is not None:  # as a key without a value, seen first
        most = tl.maximum(most, tl.load(sinks + head) * LOG2E)
        total += 1.0
    sums = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    for first_key in range(begin, tl.minimum(first + BLOCK_Q, T), BLOCK_K):
        place_k = first_key + keys
        k_tile = load_rows(k, place_k, K * H, h, T, H, BLOCK_H)
        scores = tl.dot(q_tile, tl.trans(k_tile))
        distance = rows[:, None] - place_k[None, :]
        scores = scored(scores, slope, distance, SCALE, CAP)
        seen = distance >= 0
        if starts is not None:
            seen = seen & (place_k[None, :] >= start[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        more = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - more[:, None])
        fade = tl.exp2(most - more)
        total = total * fade + tl.sum(weights, 1)
        v_tile = load_rows(v, place_k, K * H, h, T, H, BLOCK_H)
        sums = tl.dot(weights.to(v_tile.dtype), v_tile, sums * fade[:, None])
        most = more
    store_rows(out + place, rows, N * H, h, T, H, sums / total[:, None])
    tl.store(log_sums + (batch * N + head) * T + rows, most + tl.log2(total), mask=rows < T)
