"""Attention forward, bfloat16, head_dim 128/128, causal."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

try:
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_load, async_store
except ImportError:  # before Triton 3.8
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as async_load
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_shared_to_global as async_store

TILE_ROWS = gl.constexpr(128)  # query rows of a tile
ROWS = gl.constexpr(64)  # and of a warpgroup
PACK = gl.constexpr(1)  # query heads of a tile
BLOCK_N = gl.constexpr(128)
STAGES = gl.constexpr(2)
CONSUMERS = gl.constexpr(2)
GROUP = gl.constexpr(1)  # packs that read the same keys
ELEMENT = gl.constexpr(gl.bfloat16)
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
S = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N.value, 16]))  # scores
O0 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
P0 = gl.constexpr(gl.DotOperandLayout(0, O0.value, 2))
R = gl.constexpr(gl.SliceLayout(1, O0.value))  # a value per row


@gluon.jit
def rescaled0(acc, shrink):
    # acc * shrink, past which a warp jumps where that changes nothing. Of four elements of a thread, two are of one row
    # and two of another; it has no more.
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        setp.neu.f32 p, $128, 0f3F800000;
        setp.neu.or.f32 p, $130, 0f3F800000, p;
        vote.sync.any.pred p, p, 0xffffffff;
        @!p bra.uni SAME;
        mul.rn.f32 $0, $0, $128;
        mul.rn.f32 $1, $1, $129;
        mul.rn.f32 $2, $2, $130;
        mul.rn.f32 $3, $3, $131;
        mul.rn.f32 $4, $4, $132;
        mul.rn.f32 $5, $5, $133;
        mul.rn.f32 $6, $6, $134;
        mul.rn.f32 $7, $7, $135;
        mul.rn.f32 $8, $8, $136;
        mul.rn.f32 $9, $9, $137;
        mul.rn.f32 $10, $10, $138;
        mul.rn.f32 $11, $11, $139;
        mul.rn.f32 $12, $12, $140;
        mul.rn.f32 $13, $13, $141;
        mul.rn.f32 $14, $14, $142;
        mul.rn.f32 $15, $15, $143;
        mul.rn.f32 $16, $16, $144;
        mul.rn.f32 $17, $17, $145;
        mul.rn.f32 $18, $18, $146;
        mul.rn.f32 $19, $19, $147;
        mul.rn.f32 $20, $20, $148;
        mul.rn.f32 $21, $21, $149;
        mul.rn.f32 $22, $22, $150;
        mul.rn.f32 $23, $23, $151;
        mul.rn.f32 $24, $24, $152;
        mul.rn.f32 $25, $25, $153;
        mul.rn.f32 $26, $26, $154;
        mul.rn.f32 $27, $27, $155;
        mul.rn.f32 $28, $28, $156;
        mul.rn.f32 $29, $29, $157;
        mul.rn.f32 $30, $30, $158;
        mul.rn.f32 $31, $31, $159;
        mul.rn.f32 $32, $32, $160;
        mul.rn.f32 $33, $33, $161;
        mul.rn.f32 $34, $34, $162;
        mul.rn.f32 $35, $35, $163;
        mul.rn.f32 $36, $36, $164;
        mul.rn.f32 $37, $37, $165;
        mul.rn.f32 $38, $38, $166;
        mul.rn.f32 $39, $39, $167;
        mul.rn.f32 $40, $40, $168;
        mul.rn.f32 $41, $41, $169;
        mul.rn.f32 $42, $42, $170;
        mul.rn.f32 $43, $43, $171;
        mul.rn.f32 $44, $44, $172;
        mul.rn.f32 $45, $45, $173;
        mul.rn.f32 $46, $46, $174;
        mul.rn.f32 $47, $47, $175;
        mul.rn.f32 $48, $48, $176;
        mul.rn.f32 $49, $49, $177;
        mul.rn.f32 $50, $50, $178;
        mul.rn.f32 $51, $51, $179;
        mul.rn.f32 $52, $52, $180;
        mul.rn.f32 $53, $53, $181;
        mul.rn.f32 $54, $54, $182;
        mul.rn.f32 $55, $55, $183;
        mul.rn.f32 $56, $56, $184;
        mul.rn.f32 $57, $57, $185;
        mul.rn.f32 $58, $58, $186;
        mul.rn.f32 $59, $59, $187;
        mul.rn.f32 $60, $60, $188;
        mul.rn.f32 $61, $61, $189;
        mul.rn.f32 $62, $62, $190;
        mul.rn.f32 $63, $63, $191;
        SAME:
        }
        """,
        "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51,52,53,54,55,56,57,58,59,60,61,62,63,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
        [acc, shrink],
        dtype=gl.float32,
        is_pure=True,
        pack=64,
    )


@gluon.jit
def num_turns(batch, seqlen_q, packs):
    # How many tiles this program works on.
    units = gl.cdiv(gl.cdiv(seqlen_q, TILE_ROWS), 2) * batch * packs
    return gl.cdiv(units - gl.program_id(0), gl.num_programs(0)) * 2


@gluon.jit
def place(turn, batch, seqlen_q, seqlen_k, packs, window_left, window_right):
    # Which rows of which pack of heads, and which tiles of keys they see, from the last to the first: `count` of them.
    # The diagonal or the end cuts the first `num_right`, nothing the next `num_whole`, the window's left side the others.
    # Where `count` is 0 the others mean nothing, and no key is read: there may be none, at no address.
    tiles_m = gl.cdiv(seqlen_q, TILE_ROWS)
    index = gl.program_id(0) + turn // 2 * gl.num_programs(0)
    units_m = gl.cdiv(tiles_m, 2)
    m = index % units_m
    pack = index // units_m
    m = tiles_m - 1 - m  # longest first, so that the last programs to end are short
    # The second of a pair is the mirror image; an odd one out has none, and gets rows that do not exist, without keys.
    mirror = gl.where(tiles_m - 1 - m == m, tiles_m, tiles_m - 1 - m)
    m = gl.where(turn % 2 == 0, m, mirror)
    batch_index = pack // packs
    pack = pack % packs

    lowest = m * TILE_ROWS + seqlen_k - seqlen_q  # the key on the diagonal of the first row
    highest = lowest + TILE_ROWS - 1
    end = gl.minimum(seqlen_k, highest + 1)
    full_end = gl.minimum(seqlen_k, lowest + 1)
    last = gl.cdiv(gl.maximum(end, 0), BLOCK_N)
    right = gl.maximum(full_end, 0) // BLOCK_N
    begin = 0
    left = 0
    count = gl.maximum(last - begin, 0)
    count = gl.where(m < tiles_m, count, 0)
    num_right = gl.maximum(last - gl.maximum(right, begin), 1)
    num_whole = gl.maximum(count - num_right - gl.maximum(left - begin, 0), 0)
    return m * TILE_ROWS, pack, batch_index, last - 1, count, num_right, num_whole


@gluon.jit
def produce(q_desc0, k_desc0, v_desc0, q_mem0, k_mem0, v_mem0, barriers, batch, seqlen_q, seqlen_k, packs, window_left, window_right):
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    done = 0
    for turn in range(num_turns(batch, seqlen_q, packs)):
        first_row, pack, batch_index, last, count, num_right, num_whole = place(turn, batch, seqlen_q, seqlen_k, packs, window_left, window_right)
        kv_head = pack // GROUP
        for i in range(count + 1):  # K of a step before V of the step before, as they are used
            if i < count:
                stage = (done + i) % STAGES
                phase = ((done + i) // STAGES) & 1
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), 32768)
                async_load(k_desc0, [batch_index, (last - i) * BLOCK_N, kv_head, 0], k_full.index(stage), k_mem0.index(stage))
            if i == 0:
                for w in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), 16384)
                    async_load(q_desc0, [batch_index, first_row + w * ROWS, pack * PACK, 0], q_full.index(w), q_mem0.index(w))
            else:
                v_stage = (done + i - 1) % STAGES
                v_phase = ((done + i - 1) // STAGES) & 1
                mbarrier.wait(v_empty.index(v_stage), v_phase ^ 1)
                mbarrier.expect(v_full.index(v_stage), 32768)
                async_load(v_desc0, [batch_index, (last - i + 1) * BLOCK_N, kv_head, 0], v_full.index(v_stage), v_mem0.index(v_stage))
        done += count


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr, out_desc0, o_mem0, q_mem0, k_mem0, v_mem0, barriers, turns, lse, batch, seqlen_q, seqlen_k, packs, window_left, window_right, softcap, softmax_scale,
):
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    NEXT: gl.constexpr = (WARPGROUP + 1) % CONSUMERS
    FIRST_PHASE: gl.constexpr = 1 if WARPGROUP == 0 else 0  # the first warpgroup may begin
    scale = softmax_scale * LOG2_E
    q0 = q_mem0.index(WARPGROUP).reshape([64, 128])
    zero = gl.zeros([64, BLOCK_N], gl.float32, S)
    done = 0
    for turn in range(num_turns(batch, seqlen_q, packs)):
        first_row, pack, batch_index, n, count, num_right, num_whole = place(turn, batch, seqlen_q, seqlen_k, packs, window_left, window_right)
        first_row += WARPGROUP * ROWS
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, S)) // PACK
        last_key = gl.minimum(row + (seqlen_k - seqlen_q), seqlen_k - 1)
        mbarrier.wait(q_full.index(WARPGROUP), turn & 1)
        top = gl.full([64], -float("inf"), gl.float32, R)
        total = gl.zeros([64], gl.float32, R)
        if count > 0:
            acc0 = gl.zeros([64, 128], gl.float32, O0)
            # The first tile of keys.
            stage = done % STAGES
            mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
            mbarrier.wait(turns.index(WARPGROUP), (done & 1) ^ FIRST_PHASE)
            qk = warpgroup_mma(q0, k_mem0.index(stage).reshape([BLOCK_N, 128]).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.arrive(turns.index(NEXT), count=1)
            s = warpgroup_mma_wait(0, [qk])
            mbarrier.arrive(k_empty.index(stage), count=1)
            key = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
            visible = key[None, :] <= last_key[:, None]
            s = gl.where(visible, s, -float("inf"))
            new_top = gl.convert_layout(gl.max(s, 1), R) * scale
            shift = gl.where(new_top == -float("inf"), 0.0, new_top)
            s = gl.exp2(s * scale - gl.convert_layout(shift, gl.SliceLayout(1, S))[:, None])
            total = gl.convert_layout(gl.sum(s, 1), R)
            top = new_top
            weights = gl.convert_layout(s.to(ELEMENT), P0)
            for _ in range(num_right - 1):
                n -= 1
                done += 1
                stage = done % STAGES
                phase = (done // STAGES) & 1
                v_stage = (done - 1) % STAGES
                v_phase = ((done - 1) // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.wait(turns.index(WARPGROUP), (done & 1) ^ FIRST_PHASE)
                qk = warpgroup_mma(q0, k_mem0.index(stage).reshape([BLOCK_N, 128]).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(v_stage), v_phase)
                o0 = warpgroup_mma(weights, v_mem0.index(v_stage).reshape([BLOCK_N, 128]), acc0, is_async=True)
                mbarrier.arrive(turns.index(NEXT), count=1)
                s = warpgroup_mma_wait(1, [qk])
                mbarrier.arrive(k_empty.index(stage), count=1)
                key = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
                visible = key[None, :] <= last_key[:, None]
                s = gl.where(visible, s, -float("inf"))
                new_top = gl.convert_layout(gl.max(s, 1), R) * scale
                new_top = gl.where(new_top > top + 8, new_top, top)
                shift = gl.where(new_top == -float("inf"), 0.0, new_top)
                s = gl.exp2(s * scale - gl.convert_layout(shift, gl.SliceLayout(1, S))[:, None])
                shrink = gl.exp2(top - shift)
                total = total * shrink + gl.convert_layout(gl.sum(s, 1), R)
                top = new_top
                # It was waited for above and passes; but ptxas moves nothing of the softmax below its branch.
                mbarrier.wait(v_full.index(v_stage), v_phase)
                acc0 = warpgroup_mma_wait(0, [o0])
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                weights = gl.convert_layout(s.to(ELEMENT), P0)
                acc0 = rescaled0(acc0, shrink[:, None])
            for _ in range(count - num_right):
                n -= 1
                done += 1
                stage = done % STAGES
                phase = (done // STAGES) & 1
                v_stage = (done - 1) % STAGES
                v_phase = ((done - 1) // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.wait(turns.index(WARPGROUP), (done & 1) ^ FIRST_PHASE)
                qk = warpgroup_mma(q0, k_mem0.index(stage).reshape([BLOCK_N, 128]).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(v_stage), v_phase)
                o0 = warpgroup_mma(weights, v_mem0.index(v_stage).reshape([BLOCK_N, 128]), acc0, is_async=True)
                mbarrier.arrive(turns.index(NEXT), count=1)
                s = warpgroup_mma_wait(1, [qk])
                mbarrier.arrive(k_empty.index(stage), count=1)
                new_top = gl.convert_layout(gl.max(s, 1), R) * scale
                new_top = gl.where(new_top > top + 8, new_top, top)
                shift = new_top
                s = gl.exp2(s * scale - gl.convert_layout(shift, gl.SliceLayout(1, S))[:, None])
                shrink = gl.exp2(top - shift)
                total = total * shrink + gl.convert_layout(gl.sum(s, 1), R)
                top = new_top
                # It was waited for above and passes; but ptxas moves nothing of the softmax below its branch.
                mbarrier.wait(v_full.index(v_stage), v_phase)
                acc0 = warpgroup_mma_wait(0, [o0])
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                weights = gl.convert_layout(s.to(ELEMENT), P0)
                acc0 = rescaled0(acc0, shrink[:, None])
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
            # The last product.
            v_stage = done % STAGES
            v_phase = (done // STAGES) & 1
            mbarrier.wait(v_full.index(v_stage), v_phase)
            o0 = warpgroup_mma(weights, v_mem0.index(v_stage).reshape([BLOCK_N, 128]), acc0, is_async=True)
            acc0 = warpgroup_mma_wait(0, [o0])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            done += 1
            inverse = gl.where(total == 0.0, 0.0, 1.0 / total)
            tma.store_wait(0)  # of the tile before
            o_mem0.index(WARPGROUP).reshape([64, 128]).store((acc0 * inverse[:, None]).to(ELEMENT))
        else:  # nothing was loaded but Q. O is stored in both branches, since accumulators that meet are moved
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
            tma.store_wait(0)
            o_mem0.index(WARPGROUP).reshape([64, 128]).store(gl.zeros([64, 128], ELEMENT, O0))
        fence_async_shared()
        async_store(out_desc0, [batch_index, first_row, pack * PACK, 0], o_mem0.index(WARPGROUP))
        if lse.to(gl.int64) != 0:
            at = gl.arange(0, 64, R)
            lse_row = first_row + at // PACK
            lse_at = lse + ((batch_index.to(gl.int64) * packs + pack) * PACK + at % PACK) * seqlen_q + lse_row
            gl.store(lse_at, gl.where(total == 0.0, -float("inf"), top * LN_2 + gl.log(total)), mask=lse_row < seqlen_q)
    tma.store_wait(0)


@gluon.jit
def kernel(q, k, v, out, lse, workspace, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, window_left, window_right, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch, out_stride_seq, out_stride_head, softcap, softmax_scale):
    # Four dimensions, so that one descriptor serves every head, and none may reach another's rows.
    keys = gl.maximum(seqlen_k, 1)
    packs = num_heads // PACK
    q_layout0: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    q_desc0 = tma.make_tensor_descriptor(
        q,
        [batch, seqlen_q, num_heads, 128],
        [q_stride_batch, q_stride_seq, q_stride_head, 1],
        [1, ROWS, PACK, 128],
        q_layout0,
    )
    k_layout0: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    k_desc0 = tma.make_tensor_descriptor(
        k,
        [batch, keys, num_kv_heads, 128],
        [k_stride_batch, k_stride_seq, k_stride_head, 1],
        [1, BLOCK_N, 1, 128],
        k_layout0,
    )
    v_layout0: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    v_desc0 = tma.make_tensor_descriptor(
        v,
        [batch, keys, num_kv_heads, 128],
        [v_stride_batch, v_stride_seq, v_stride_head, 1],
        [1, BLOCK_N, 1, 128],
        v_layout0,
    )
    out_layout0: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    out_desc0 = tma.make_tensor_descriptor(
        out,
        [batch, seqlen_q, num_heads, 128],
        [out_stride_batch, out_stride_seq, out_stride_head, 1],
        [1, ROWS, PACK, 128],
        out_layout0,
    )
    q_mem0 = gl.allocate_shared_memory(ELEMENT, [CONSUMERS, 1, ROWS, PACK, 128], q_layout0)
    k_mem0 = gl.allocate_shared_memory(ELEMENT, [STAGES, 1, BLOCK_N, 1, 128], k_layout0)
    v_mem0 = gl.allocate_shared_memory(ELEMENT, [STAGES, 1, BLOCK_N, 1, 128], v_layout0)
    o_mem0 = gl.allocate_shared_memory(ELEMENT, [CONSUMERS, 1, ROWS, PACK, 128], out_layout0)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_empty.index(i), count=1)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_empty.index(i), count=2)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(v_full.index(i), count=1)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(v_empty.index(i), count=2)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (0, out_desc0, o_mem0, q_mem0, k_mem0, v_mem0, barriers, turns, lse, batch, seqlen_q, seqlen_k, packs, window_left, window_right, softcap, softmax_scale)),
            (consume, (1, out_desc0, o_mem0, q_mem0, k_mem0, v_mem0, barriers, turns, lse, batch, seqlen_q, seqlen_k, packs, window_left, window_right, softcap, softmax_scale)),
            (produce, (q_desc0, k_desc0, v_desc0, q_mem0, k_mem0, v_mem0, barriers, batch, seqlen_q, seqlen_k, packs, window_left, window_right)),
        ],
        [4, 1],
        [240, 24],
    )


def grid(batch, seqlen_q, seqlen_k, num_heads, num_kv_heads):
    tiles_m = -(-seqlen_q // 128)
    units = -(-tiles_m // 2) * batch * num_heads
    return (min(units, 132),)
