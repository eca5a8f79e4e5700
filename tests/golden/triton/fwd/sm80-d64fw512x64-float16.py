"""Attention forward, float16, head_dim 64/64, window."""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(128)  # rows of a tile: query rows
BLOCK_N = tl.constexpr(64)
PACK = tl.constexpr(1)  # query heads in a tile
SHARE = tl.constexpr(1)  # tiles of neighbouring heads that read the same keys
PRECISION = tl.constexpr('ieee')
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(tile, q, k, v, out, lse, workspace, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left, window_right, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch, out_stride_seq, out_stride_head, softcap, softmax_scale):
    # Which rows, of which head ------------------------------------------------------------------
    tiles_m = tl.cdiv(seqlen_q * PACK, BLOCK_M)
    heads = num_heads // PACK
    m = tile % tiles_m
    head = tile // tiles_m
    batch_index = head // heads
    head = head % heads
    kv_head = head // SHARE
    # 64 bits wherever a stride takes part.
    batch_64 = batch_index.to(tl.int64)
    kv_head_64 = kv_head.to(tl.int64)

    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < seqlen_q * PACK
    q_row = row // PACK
    q_head = head * PACK + row % PACK
    q_row_64 = q_row.to(tl.int64)
    q_head_64 = q_head.to(tl.int64)
    q_at = q + batch_64 * q_stride_batch + (q_row_64 * q_stride_seq + q_head_64 * q_stride_head)[:, None]
    q_dim0 = 0 + tl.arange(0, 64).to(tl.int64)
    q0 = tl.load(q_at + q_dim0[None, :], mask=in_rows[:, None], other=0.0)

    # Which keys: some rows see some from begin to end, all rows all from full_begin to full_end ------
    lowest = m * BLOCK_M // PACK + seqlen_k - seqlen_q  # the key on the diagonal of the first row
    highest = tl.minimum((m * BLOCK_M + BLOCK_M - 1) // PACK, seqlen_q - 1) + seqlen_k - seqlen_q
    first_key = q_row + (seqlen_k - seqlen_q - window_left)
    last_key = tl.minimum(q_row + (seqlen_k - seqlen_q) + window_right, seqlen_k - 1)
    begin = tl.maximum(lowest - window_left, 0) // BLOCK_N * BLOCK_N
    full_begin = tl.cdiv(tl.maximum(highest - window_left, 0), BLOCK_N) * BLOCK_N
    full_end = tl.maximum(tl.minimum(lowest + window_right + 1, seqlen_k), 0) // BLOCK_N * BLOCK_N
    end = tl.maximum(tl.minimum(highest + window_right + 1, seqlen_k), 0)
    key = tl.arange(0, BLOCK_N)
    v_dim0 = 0 + tl.arange(0, 64).to(tl.int64)
    key_64 = key.to(tl.int64)
    k_at = k + batch_64 * k_stride_batch + kv_head_64 * k_stride_head + key_64[:, None] * k_stride_seq
    v_at = v + batch_64 * v_stride_batch + kv_head_64 * v_stride_head + key_64[:, None] * v_stride_seq
    k_at0 = k_at + q_dim0[None, :]
    v_at0 = v_at + v_dim0[None, :]

    # Scores are kept in units of log 2. A scale of 0 becomes tiny: 0 * inf would be NaN.
    scale = softmax_scale * LOG2_E
    scale = tl.where(tl.abs(scale) < 1e-30, 1e-30, scale)
    hidden = tl.where(scale < 0, float("inf"), -float("inf"))  # -inf once scaled
    top_so_far = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, 64], tl.float32)
    for start_n in tl.range(begin, tl.minimum(full_begin, end), BLOCK_N):
        k0 = tl.load(k_at0 + start_n * k_stride_seq, mask=(start_n + key < seqlen_k)[:, None], other=0.0)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        visible = (start_n + key[None, :] >= first_key[:, None]) & (start_n + key[None, :] <= last_key[:, None])
        scores = tl.where(visible, scores, hidden)
        # A negative scale turns the order of scores around; the branch is free, a sign flip is not.
        if scale < 0:
            top = tl.min(scores, 1)
        else:
            top = tl.max(scores, 1)
        new_top = tl.maximum(top_so_far, top * scale)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key seen so far: not inf - inf
        weights = tl.math.exp2(scores * scale - shift[:, None])
        shrink = tl.math.exp2(top_so_far - shift)
        total = total * shrink + tl.sum(weights, 1)
        top_so_far = new_top
        weights = weights.to(v.dtype.element_ty)
        v0 = tl.load(v_at0 + start_n * v_stride_seq, mask=(start_n + key < seqlen_k)[:, None], other=0.0)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    for start_n in tl.range(full_begin, full_end, BLOCK_N):
        k0 = tl.load(k_at0 + start_n * k_stride_seq)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        # A negative scale turns the order of scores around; the branch is free, a sign flip is not.
        if scale < 0:
            top = tl.min(scores, 1)
        else:
            top = tl.max(scores, 1)
        new_top = tl.maximum(top_so_far, top * scale)
        shift = new_top
        weights = tl.math.exp2(scores * scale - shift[:, None])
        shrink = tl.math.exp2(top_so_far - shift)
        total = total * shrink + tl.sum(weights, 1)
        top_so_far = new_top
        weights = weights.to(v.dtype.element_ty)
        v0 = tl.load(v_at0 + start_n * v_stride_seq)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    for start_n in tl.range(tl.maximum(full_begin, full_end), end, BLOCK_N):
        k0 = tl.load(k_at0 + start_n * k_stride_seq, mask=(start_n + key < seqlen_k)[:, None], other=0.0)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        visible = (start_n + key[None, :] >= first_key[:, None]) & (start_n + key[None, :] <= last_key[:, None])
        scores = tl.where(visible, scores, hidden)
        # A negative scale turns the order of scores around; the branch is free, a sign flip is not.
        if scale < 0:
            top = tl.min(scores, 1)
        else:
            top = tl.max(scores, 1)
        new_top = tl.maximum(top_so_far, top * scale)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key seen so far: not inf - inf
        weights = tl.math.exp2(scores * scale - shift[:, None])
        shrink = tl.math.exp2(top_so_far - shift)
        total = total * shrink + tl.sum(weights, 1)
        top_so_far = new_top
        weights = weights.to(v.dtype.element_ty)
        v0 = tl.load(v_at0 + start_n * v_stride_seq, mask=(start_n + key < seqlen_k)[:, None], other=0.0)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)

    # Rows that saw no key have a total of 0: their output is 0, their lse -inf -----------------------
    total = tl.where(total == 0.0, 1.0, total)
    inverse = 1.0 / total
    out_at = out + batch_64 * out_stride_batch + (q_row_64 * out_stride_seq + q_head_64 * out_stride_head)[:, None]
    tl.store(
        out_at + v_dim0[None, :],
        (acc0 * inverse[:, None]).to(out.dtype.element_ty),
        mask=in_rows[:, None],
    )
    if lse.to(tl.int64) != 0:
        lse_at = lse + (batch_64 * num_heads + q_head_64) * seqlen_q + q_row
        tl.store(lse_at, top_so_far * LN_2 + tl.log(total), mask=in_rows)


@triton.jit
def kernel(q, k, v, out, lse, workspace, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left, window_right, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch, out_stride_seq, out_stride_head, softcap, softmax_scale):
    attend(tl.program_id(0), q, k, v, out, lse, workspace, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left, window_right, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch, out_stride_seq, out_stride_head, softcap, softmax_scale)


def grid(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads):
    tiles = -(-seqlen_q * 1 // 128) * batch * (num_heads // 1)
    return (tiles,)
