"""Attention forward, bfloat16, head_dim 128/128, causal."""

import triton
import triton.language as tl

BLOCK_M = tl.constexpr(64)  # rows of a tile: (query row, query head of the group) pairs
BLOCK_N = tl.constexpr(64)
PACK = tl.constexpr(4)  # query heads in a tile
SHARE = tl.constexpr(1)  # tiles of neighbouring heads that read the same keys
PRECISION = tl.constexpr('ieee')
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
DIM_V = tl.constexpr(128)
MOST_PARTS = tl.constexpr(256)


@triton.jit
def attend(tile, q, k, v, out, lse, workspace, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left, window_right, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch, out_stride_seq, out_stride_head, softcap, softmax_scale):
    # Which rows, of which head ------------------------------------------------------------------
    tiles_m = tl.cdiv(seqlen_q * PACK, BLOCK_M)
    heads = num_heads // PACK
    m = tile % tiles_m
    head = tile // tiles_m
    m = tiles_m - 1 - m  # longest first, so that the last programs to end are short
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
    q_dim0 = 0 + tl.arange(0, 128).to(tl.int64)
    q0 = tl.load(q_at + q_dim0[None, :], mask=in_rows[:, None], other=0.0)

    # Which keys: all rows see those below full_end, some rows some of those below end --------------
    last_key = q_row + (seqlen_k - seqlen_q)
    highest = tl.minimum((m * BLOCK_M + BLOCK_M - 1) // PACK, seqlen_q - 1)
    end = tl.maximum(highest + 1 + seqlen_k - seqlen_q, 0)
    full_end = tl.maximum(m * BLOCK_M // PACK + 1 + seqlen_k - seqlen_q, 0) // BLOCK_N * BLOCK_N
    # Which part of them: as many key tiles as every other part, the last fewer or none --------------
    seen_from = 0
    steps = tl.cdiv(tl.cdiv(tl.maximum(end - seen_from, 0), BLOCK_N), tl.num_programs(1))
    begin = seen_from + tl.program_id(1) * steps * BLOCK_N
    end = tl.minimum(end, begin + steps * BLOCK_N)
    full_end = tl.minimum(full_end, end)
    key = tl.arange(0, BLOCK_N)
    v_dim0 = 0 + tl.arange(0, 128).to(tl.int64)
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
    acc0 = tl.zeros([BLOCK_M, 128], tl.float32)
    for start_n in tl.range(begin, end, BLOCK_N):
        k0 = tl.load(k_at0 + start_n * k_stride_seq, mask=(start_n + key < seqlen_k)[:, None], other=0.0)
        scores = tl.dot(q0, k0.T, input_precision=PRECISION)
        if start_n + BLOCK_N > full_end:
            visible = start_n + key[None, :] <= last_key[:, None]
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

    if tl.num_programs(1) > 1:
        # For `combine`: sums of this part as they are, then the row's top and total. Those of a row
        # that saw no key are not written: its total of 0 says so ---------------------------------------
        part = tl.program_id(1).to(tl.int64)
        parts = tl.num_programs(1).to(tl.int64)
        rows = batch.to(tl.int64) * num_heads * seqlen_q
        at = part * rows + (batch_64 * num_heads + q_head_64) * seqlen_q + q_row
        seen = in_rows & (total != 0.0)
        tl.store(
            workspace + at[:, None] * DIM_V + v_dim0[None, :],
            acc0,
            mask=seen[:, None],
        )
        tops = workspace + parts * rows * DIM_V
        tl.store(tops + at, top_so_far, mask=in_rows)
        tl.store(tops + parts * rows + at, total, mask=in_rows)
    else:
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


@triton.jit
def combine(q, k, v, out, lse, workspace, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left, window_right, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch, out_stride_seq, out_stride_head, softcap, softmax_scale):
    # One row of one head for each program; the second axis of the grid has as many as there are parts.
    parts = tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * parts + tl.program_id(1)
    rows = batch.to(tl.int64) * num_heads * seqlen_q
    in_rows = row < rows
    tops = workspace + parts * rows * DIM_V + row
    totals = tops + parts * rows
    part = tl.arange(0, MOST_PARTS).to(tl.int64)
    in_parts = (part < parts) & in_rows
    top = tl.load(tops + part * rows, mask=in_parts, other=-float("inf"))
    total = tl.load(totals + part * rows, mask=in_parts, other=0.0)
    highest = tl.max(top, 0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(total * tl.math.exp2(top - shift), 0)
    total = tl.where(total == 0.0, 1.0, total)

    dim = tl.arange(0, 128)
    in_dim = dim < DIM_V
    acc = tl.zeros([128], tl.float32)
    for first in range(0, parts, 64):
        some = first + tl.arange(0, 64).to(tl.int64)
        in_some = (some < parts) & in_rows
        weight = tl.math.exp2(tl.load(tops + some * rows, mask=in_some, other=-float("inf")) - shift)
        seen = tl.load(totals + some * rows, mask=in_some, other=0.0) != 0.0
        at = workspace + (some * rows + row)[:, None] * DIM_V + dim[None, :]
        sums = tl.load(at, mask=seen[:, None] & in_dim[None, :], other=0.0)
        acc += tl.sum(sums * weight[:, None], 0)

    q_row = row % seqlen_q
    q_head = row // seqlen_q % num_heads
    batch_index = row // seqlen_q // num_heads
    out_at = out + batch_index * out_stride_batch + q_row * out_stride_seq + q_head * out_stride_head
    tl.store(out_at + dim, (acc / total).to(out.dtype.element_ty), mask=in_dim & in_rows)
    if lse.to(tl.int64) != 0:
        tl.store(lse + row, highest * LN_2 + tl.log(total), mask=in_rows)


def tiles_and_parts(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads):
    tiles = -(-seqlen_q * 4 // 64) * batch * (num_heads // 4)
    keys = seqlen_k
    steps = -(-keys // 64)
    # As many parts as fill the device some whole number of times, whichever ends first. In key tiles:
    # a program costs 2 more than those it goes through, a second kernel 4.
    best, soonest = 1, -(-tiles // 264) * (steps + 2)
    for rounds in range(1, 5) if 0 < tiles < 264 else ():
        parts = min(rounds * 264 // tiles, steps, 256)
        if parts > best:
            each = -(-steps // parts)
            ends = -(-tiles * parts // 264) * (each + 2) + 4
            if ends < soonest:
                best, soonest = -(-steps // each), ends
    return tiles, best


def grid(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads):
    return tiles_and_parts(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads)


def workspace(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads):
    _, parts = tiles_and_parts(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads)
    return parts * batch * num_heads * seqlen_q * 520 if parts > 1 else 0


def combine_grid(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads):
    _, parts = tiles_and_parts(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads)
    return -(-batch * num_heads * seqlen_q // parts), parts
