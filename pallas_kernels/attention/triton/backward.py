"""The gradient of attention, its scores computed again: a kernel for d q, then one for d k and d v.

    p = exp2(s - log_sums);  delta = sum d_out out;  d s = p (d_out v^T - delta)
    d q = d s k;  d k = d s^T q;  d v = p^T d_out

Each sum belongs to one program, so the result is the same in every run. Queries that share a key head are added up
inside the program of that head's keys.
"""

import triton
import triton.language as tl

from pallas_kernels.attention.triton.scores import bent, load_rows, scored, store_rows


@triton.jit
def queries_kernel(
    q,  # [B, T, N, H]
    k,  # [B, T, K, H]
    v,
    starts,  # int32 [B, T], or None
    slopes,  # float32 [N], or None
    out,  # [B, T, N, H]
    d_out,
    log_sums,  # float32 [B, N, T]
    d_q,  # [B, T, N, H]
    deltas,  # float32 [B, N, T]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = (tl.program_id(0) // N).to(tl.int64)
    head = tl.program_id(0) % N
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q
    rows, h = first + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    keys = tl.arange(0, BLOCK_K)
    k += batch * T * K * H + head // (N // K) * H
    v += batch * T * K * H + head // (N // K) * H
    place = batch * T * N * H + head * H
    row_sums = (batch * N + head) * T + rows
    d_out_tile = load_rows(d_out + place, rows, N * H, h, T, H, BLOCK_H)
    out_tile = load_rows(out + place, rows, N * H, h, T, H, BLOCK_H)
    delta = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(deltas + row_sums, delta, mask=rows < T)
    q_tile = load_rows(q + place, rows, N * H, h, T, H, BLOCK_H)
    log_sum = tl.load(log_sums + row_sums, mask=rows < T, other=0.0)
    begin, start, slope = 0, rows, None
    if starts is not None:
        begin = tl.load(starts + batch * T + first) // BLOCK_K * BLOCK_K
        start = tl.load(starts + batch * T + rows, mask=rows < T, other=0)
    if slopes is not None:
        slope = tl.load(slopes + head)
    d_q_sums = tl.zeros((BLOCK_Q, BLOCK_H), tl.float32)
    for first_key in range(begin, tl.minimum(first + BLOCK_Q, T), BLOCK_K):
        place_k = first_key + keys
        k_tile = load_rows(k, place_k, K * H, h, T, H, BLOCK_H)
        products = tl.dot(q_tile, tl.trans(k_tile))
        distance = rows[:, None] - place_k[None, :]
        scores = scored(products, slope, distance, SCALE, CAP)
        seen = distance >= 0
        if starts is not None:
            seen = seen & (place_k[None, :] >= start[:, None])
        weights = tl.where(seen, tl.exp2(scores - log_sum[:, None]), 0.0)
        v_tile = load_rows(v, place_k, K * H, h, T, H, BLOCK_H)
        d_scores = weights * (tl.dot(d_out_tile, tl.trans(v_tile)) - delta[:, None])
        if CAP != 0:
            turned = bent(products, SCALE, CAP)
            d_scores = d_scores * (1.0 - turned * turned)
        d_q_sums = tl.dot(d_scores.to(k_tile.dtype), k_tile, d_q_sums)
    store_rows(d_q + place, rows, N * H, h, T, H, d_q_sums * SCALE)


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    starts,
    slopes,
    d_out,
    log_sums,
    deltas,
    d_k,  # [B, T, K, H]
    d_v,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COUNTED: tl.constexpr,  # starts that are looked at together
):
    batch = (tl.program_id(0) // K).to(tl.int64)
    key_head = tl.program_id(0) % K
    first_key = tl.program_id(1) * BLOCK_K  # those with the most queries begin first
    place_k, h = first_key + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_H)
    place = batch * T * K * H + key_head * H
    k_tile = load_rows(k + place, place_k, K * H, h, T, H, BLOCK_H)
    v_tile = load_rows(v + place, place_k, K * H, h, T, H, BLOCK_H)
    end = T
    if starts is not None:  # starts never fall: the queries that see one of these keys are those up to a place
        starts += batch * T
        end = first_key
        for at in range(first_key, T, COUNTED):
            some = at + tl.arange(0, COUNTED)
            start = tl.load(starts + some, mask=some < T, other=T)
            end += tl.sum((start < tl.minimum(first_key + BLOCK_K, T)).to(tl.int32), 0)
    d_k_sums = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    d_v_sums = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for group in range(N // K):
        head = key_head * (N // K) + group
        q_head = q + batch * T * N * H + head * H
        d_out_head = d_out + batch * T * N * H + head * H
        row_sums = (batch * N + head) * T
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head)
        for first in range(first_key // BLOCK_Q * BLOCK_Q, end, BLOCK_Q):
            rows = first + tl.arange(0, BLOCK_Q)
            q_tile = load_rows(q_head, rows, N * H, h, T, H, BLOCK_H)
            log_sum = tl.load(log_sums + row_sums + rows, mask=rows < T, other=0.0)
            products = tl.dot(k_tile, tl.trans(q_tile))  # [keys, queries]
            distance = rows[None, :] - place_k[:, None]
            scores = scored(products, slope, distance, SCALE, CAP)
            seen = (distance >= 0) & (rows[None, :] < T)
            if starts is not None:
                start = tl.load(starts + rows, mask=rows < T, other=0)
                seen = seen & (place_k[:, None] >= start[None, :])
            weights = tl.where(seen, tl.exp2(scores - log_sum[None, :]), 0.0)
            d_out_tile = load_rows(d_out_head, rows, N * H, h, T, H, BLOCK_H)
            d_v_sums = tl.dot(weights.to(d_out_tile.dtype), d_out_tile, d_v_sums)
            delta = tl.load(deltas + row_sums + rows, mask=rows < T, other=0.0)
            d_scores = weights * (tl.dot(v_tile, tl.trans(d_out_tile)) - delta[None, :])
            if CAP != 0:
                turned = bent(products, SCALE, CAP)
                d_scores = d_scores * (1.0 - turned * turned)
            d_k_sums = tl.dot(d_scores.to(q_tile.dtype), q_tile, d_k_sums)
    store_rows(d_k + place, place_k, K * H, h, T, H, d_k_sums * SCALE)
    store_rows(d_v + place, place_k, K * H, h, T, H, d_v_sums)
