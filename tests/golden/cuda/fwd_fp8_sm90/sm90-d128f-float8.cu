// Forward attention, float8_e4m3fn, head_dim 128, full.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cute/layout.hpp>

#include <atomic>
#include <cstdint>

constexpr int kHeadDim = 128, kHeadDimV = 128;
constexpr int kColumnsQK = 128, kColumnsV = 128;  // in shared memory, zero-filled
constexpr int kConsumers = 3, kThreads = 512, kBlocksPerSM = 1;
constexpr int kBlockM = 192, kBlockN = 96, kStages = 2, kLandings = 1, kCluster = 1;
constexpr int kElementBytes = 1;
constexpr auto kElementType = CU_TENSOR_MAP_DATA_TYPE_UINT8;  // TMA moves bytes; there is no type for them
constexpr int kSharedBytes = 87040;
constexpr bool kPersistent = true, kDynamic = false;

// The width of a swizzled row of shared memory, in elements: also that of a TMA box.
constexpr int chunk_of(int columns) { return columns % 128 == 0 ? 128 : columns % 64 == 0 ? 64 : 32; }
constexpr int kChunkQK = chunk_of(kColumnsQK), kChunkV = chunk_of(kColumnsV), kChunkN = chunk_of(kBlockN);

struct Arguments {
  CUtensorMap q, k, v;
  __nv_bfloat16* out;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  float* lse;
  float const *q_descale, *k_descale, *v_descale;
  int seqlen_q, seqlen_k, num_heads, num_kv_heads, group_size, window_left, window_right;
  int tiles_m, tiles, heads_per_section, num_head_batches;
  unsigned* counter;  // tiles drawn so far; null: each block takes every gridDim.x-th
  float softmax_scale, softcap;
};

// Device code. The compiler's pass over the host's code needs none of it, which saves a third of its time. (It
// does need to know the variables that CuTe's headers define for the device: those of layout.hpp.)
#ifdef __CUDA_ARCH__
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

using namespace cute;

using Element = float_e4m3_t;
constexpr bool kCausal = false, kLocal = false, kSoftcap = false;
constexpr bool kOverlap = true, kPingpong = true;
constexpr bool kHeadsShareL2 = false;
constexpr int kConsumerRegisters = 152, kProducerRegisters = 56;

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// The warps of the producer's warpgroup: the first loads, the others transpose V.
constexpr int kTransposers = 3;
// P is held times 2^8, so that the greatest of a row is 256: e4m3 reaches from 2^-9 to 448. Sums of P carry the
// same factor. It has no room to grow; and relative to an older largest score the greatest of a row, which may be most
// of its sum, would no more be a power of two and lose up to 1 part in 16 to rounding.
constexpr float kLog2PFactor = 8.0f, kSlack = 0.0f;

// Shared memory ----------------------------------------------------------------------------------

// A tile is stored in chunks of as many columns as one swizzled row holds.
template <int kColumns>
using KMajorAtom = conditional_t<chunk_of(kColumns) == 128, GMMA::Layout_K_SW128_Atom<Element>,
                   conditional_t<chunk_of(kColumns) == 64, GMMA::Layout_K_SW64_Atom<Element>,
                                 GMMA::Layout_K_SW32_Atom<Element>>>;

using LayoutQ = decltype(tile_to_shape(KMajorAtom<kColumnsQK>{}, Shape<Int<kBlockM>, Int<kColumnsQK>>{}));
using LayoutK = decltype(tile_to_shape(KMajorAtom<kColumnsQK>{}, Shape<Int<kBlockN>, Int<kColumnsQK>, Int<kStages>>{}));
using LayoutVt = decltype(tile_to_shape(KMajorAtom<kBlockN>{}, Shape<Int<kHeadDimV>, Int<kBlockN>, Int<kStages>>{}));

struct alignas(1024) Shared {
  alignas(1024) Element k[kStages * kBlockN * kColumnsQK];
  alignas(1024) Element vt[kStages * kBlockN * kHeadDimV];   // columns by keys, in the order of `transpose_tile`
  alignas(1024) Element v[kLandings * kBlockN * kColumnsV];  // as it arrives, keys by columns
  alignas(1024) Element q[kBlockM * kColumnsQK];
  uint64_t k_full[kStages], k_empty[kStages], vt_full[kStages], vt_empty[kStages];
  uint64_t v_full[kLandings], v_empty[kLandings];
  uint64_t q_full[kConsumers], q_empty[kConsumers];  // each warpgroup has its own rows of Q
  uint64_t drawn_full[2], drawn_empty[2];
  int drawn[2];  // indices of coming tiles, where blocks draw them
};

static_assert(sizeof(Shared) == kSharedBytes, "the declaration's smem_bytes is not what the kernel uses");


using Barrier = cutlass::arch::ClusterBarrier;
using BytesBarrier = cutlass::arch::ClusterTransactionBarrier;

// Where a ring stands: the stage, and the parity of how often it went round. One number, for a producer has few
// registers.
template <int kDepth>
struct Ring {
  uint32_t steps = 0;
  CUTE_DEVICE int stage() const { return steps % kDepth; }
  CUTE_DEVICE uint32_t parity() const { return steps / kDepth % 2; }
  CUTE_DEVICE void advance() { ++steps; }
};

// Whether the stage at which `ring` stands is full: to ask early, and to wait with `wait_full` only if it was not.
// The answer takes as long as some forty instructions.
template <int kDepth>
CUTE_DEVICE bool is_full(uint64_t const* full, Ring<kDepth> const& ring) {
  return Barrier::test_wait(full + ring.stage(), ring.parity(), 1u);
}
template <int kDepth>
CUTE_DEVICE void wait_full(uint64_t const* full, Ring<kDepth> const& ring, bool known) {
  if (!known) Barrier::wait(full + ring.stage(), ring.parity());
}

// One lane of every warp lets the one who fills a stage (in a cluster: those who do) overwrite it.
CUTE_DEVICE void release(uint64_t* empty) {
  const int lane = threadIdx.x % 32;
  if constexpr (kCluster == 1) {
    if (lane == 0) Barrier::arrive(empty);
  } else {
    Barrier::arrive(empty, lane, lane < kCluster);
  }
}

// As `release`, where only this block fills the stage.
CUTE_DEVICE void release_here(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) Barrier::arrive(empty);
}


struct Place {
  int m, head, batch;
};

// Tiles in order: with a mask the longest first, and all heads whose keys fit L2 together side by side.
CUTE_DEVICE Place tile_at(Arguments const& args, int index) {

  int m, head_batch;
  if constexpr (kHeadsShareL2) {
    const int per_section = args.heads_per_section * args.tiles_m;
    const int section = index / per_section, first = section * args.heads_per_section;
    const int heads = min(args.heads_per_section, args.num_head_batches - first);
    const int within = index - section * per_section;
    m = within / heads;
    head_batch = first + within - m * heads;
  } else {
    head_batch = index / args.tiles_m;
    m = index - head_batch * args.tiles_m;
  }
  if constexpr (kCausal || kLocal) m = args.tiles_m - 1 - m;
  const int batch = head_batch / args.num_heads;
  return {m, head_batch - batch * args.num_heads, batch};
}

// The tiles of keys that a tile of queries sees, from the last to the first.
struct Keys {
  int begin, end;   // all it sees
  int left, right;  // those from `right` on are cut by the diagonal or the end, those before `left` by the window
};

CUTE_DEVICE Keys keys_of(Arguments const& args, int m) {
  const int first_row = m * kBlockM + args.seqlen_k - args.seqlen_q, last_row = first_row + kBlockM - 1;
  int end = args.seqlen_k, whole = args.seqlen_k;
  Keys keys{0, 0, 0, 0};
  if constexpr (kCausal || kLocal) {
    const int reach = kLocal ? args.window_right : 0;
    end = min(end, last_row + reach + 1);
    whole = min(whole, first_row + reach + 1);
  }
  keys.end = (max(end, 0) + kBlockN - 1) / kBlockN;
  keys.right = max(whole, 0) / kBlockN;
  if constexpr (kLocal) {
    keys.begin = max(first_row - args.window_left, 0) / kBlockN;
    keys.left = (max(last_row - args.window_left, 0) + kBlockN - 1) / kBlockN;
  }

  return keys;
}

// Where a block stands in its work. Tiles are drawn by the producer, for the turn after the present one, and
// handed to the consumers; the last draw of a launch makes the counter ready for the next.
struct Turn {
  int index;
  uint32_t turns = 0;

  CUTE_DEVICE Turn() : index(blockIdx.x) {}
  CUTE_DEVICE int slot() const { return turns % 2; }  // also the parity of all that is used once a turn
  CUTE_DEVICE uint32_t parity() const { return turns / 2 % 2; }
  CUTE_DEVICE void advance(int next) {
    index = next;
    ++turns;
  }
};

CUTE_DEVICE int draw(Arguments const& args, Turn const& turn) {
  if (args.counter == nullptr) return turn.index + gridDim.x;
  const unsigned drawn = atomicAdd(args.counter, 1u);
  if (drawn + 1 == unsigned(args.tiles)) atomicExch(args.counter, 0u);
  return gridDim.x + drawn;
}

CUTE_DEVICE void hand_over(Shared& shared, Turn const& turn, int next) {
  Barrier::wait(&shared.drawn_empty[turn.slot()], turn.parity() ^ 1);
  shared.drawn[turn.slot()] = next;
  Barrier::arrive(&shared.drawn_full[turn.slot()]);
}

CUTE_DEVICE int drawn(Shared& shared, Turn const& turn) {
  Barrier::wait(&shared.drawn_full[turn.slot()], turn.parity());
  const int next = shared.drawn[turn.slot()];
  __syncwarp();
  if (threadIdx.x % 32 == 0) Barrier::arrive(&shared.drawn_empty[turn.slot()]);
  return next;
}


// A tile of K or V: all of it, or in a cluster this block's share of it, which all blocks receive.
template <int kColumns, int kChunk>
CUTE_DEVICE void load_keys(CUtensorMap const& map, uint64_t* full, Element* to, int tile, int head, int batch) {
  constexpr auto kHint = TMA::CacheHintSm90::EVICT_LAST;
  constexpr int kShare = kBlockN / kCluster;
  const int share = kCluster == 1 ? 0 : int(blockIdx.x % kCluster) * kShare;
  BytesBarrier::arrive_and_expect_tx(full, kBlockN * kColumns * sizeof(Element));
  CUTE_UNROLL
  for (int c = 0; c < kColumns; c += kChunk) {
    Element* at = to + c * kBlockN + share * kChunk;
    if constexpr (kCluster == 1) {
      SM90_TMA_LOAD_4D::copy(&map, full, uint64_t(kHint), at, c, tile * kBlockN, head, batch);
    } else {
      SM90_TMA_LOAD_MULTICAST_4D::copy(&map, full, uint16_t((1 << kCluster) - 1), uint64_t(kHint), at, c,
                                       tile * kBlockN + share, head, batch);
    }
  }
}

// The loading warp; one thread of it.
CUTE_DEVICE void produce(Arguments const& args, Shared& shared) {
  CUTE_UNROLL
  for (CUtensorMap const* map : {&args.q, &args.k, &args.v}) {
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(map));
  }
  Ring<kStages> k_ring;
  Ring<kLandings> v_ring;
  Turn turn;
  while (turn.index < args.tiles) {
    const Place tile = tile_at(args, turn.index);
    const Keys keys = keys_of(args, tile.m);
    const int kv_head = tile.head / args.group_size;
    const auto load_k = [&](int n) {
      Barrier::wait(&shared.k_empty[k_ring.stage()], k_ring.parity() ^ 1);
      load_keys<kColumnsQK, kChunkQK>(args.k, &shared.k_full[k_ring.stage()],
                                      shared.k + k_ring.stage() * kBlockN * kColumnsQK, n, kv_head, tile.batch);
      k_ring.advance();
    };
    const auto load_v = [&](int n) {
      Barrier::wait(&shared.v_empty[v_ring.stage()], v_ring.parity() ^ 1);
      load_keys<kColumnsV, kChunkV>(args.v, &shared.v_full[v_ring.stage()],
                                    shared.v + v_ring.stage() * kBlockN * kColumnsV, n, kv_head, tile.batch);
      v_ring.advance();
    };
    // What takes the place of the tile before, in the order in which that is done with.
    if (keys.end > keys.begin) {
      load_k(keys.end - 1);
      load_v(keys.end - 1);
    }
    CUTE_NO_UNROLL  // a producer has few registers
    for (int w = 0; w < kConsumers; ++w) {
      Barrier::wait(&shared.q_empty[w], turn.slot() ^ 1);
      BytesBarrier::arrive_and_expect_tx(&shared.q_full[w], 64 * kColumnsQK * sizeof(Element));
      CUTE_UNROLL
      for (int c = 0; c < kColumnsQK; c += kChunkQK) {
        SM90_TMA_LOAD_4D::copy(&args.q, &shared.q_full[w], uint64_t(TMA::CacheHintSm90::EVICT_FIRST),
                               shared.q + w * 64 * kChunkQK + c * kBlockM, c, tile.m * kBlockM + w * 64, tile.head,
                               tile.batch);
      }
    }
    // The next tile is drawn before the last keys are asked for, when the end of this one is near: who draws at the
    // start of a long tile keeps the next from those who end before. That cost up to a quarter of the time where
    // blocks take one or two tiles.
    int next = 0;
    if constexpr (kDynamic) {
      if (keys.end - keys.begin <= 1) next = draw(args, turn);
    }
    CUTE_NO_UNROLL
    for (int n = keys.end - 2; n >= keys.begin; --n) {
      if constexpr (kDynamic) {
        if (n == keys.begin) next = draw(args, turn);
      }
      load_k(n);
      load_v(n);
    }
    if constexpr (kDynamic) hand_over(shared, turn, next);
    if constexpr (!kPersistent) break;
    turn.advance(kDynamic ? next : turn.index + gridDim.x);
  }
}

// Warpgroups take turns: `wait_turn` returns once the one before has issued its products.
CUTE_DEVICE void wait_turn(int warpgroup) {
  if constexpr (kPingpong) cutlass::arch::NamedBarrier::sync(256, uint32_t(1 + warpgroup));
}
CUTE_DEVICE void end_turn(int warpgroup) {
  if constexpr (kPingpong) {
    cutlass::arch::NamedBarrier::arrive(256, uint32_t(1 + (warpgroup + 1 == kConsumers ? 0 : warpgroup + 1)));
  }
}

// Issues a product and does not wait for it.
template <bool kZero, class Mma, class A, class B, class C>
CUTE_DEVICE void issue(Mma& mma, A const& a, B const& b, C& c) {
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  if constexpr (kZero) mma.accumulate_ = GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    cute::gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// Producer: the transposing warps --------------------------------------------------------------------

// Where the 16-byte unit `unit` of `row` lies in rows of kBytes that are swizzled as TMA and WGMMA have it.
template <int kBytes>
CUTE_DEVICE int swizzled(int row, int unit) {
  constexpr int kRowsPerUnit = 128 / kBytes;  // so many rows have their units in the same order
  return row * kBytes + ((unit ^ (row / kRowsPerUnit % (kBytes / 16))) * 16);
}

// V from keys by columns to columns by keys, as WGMMA wants 8-bit operands, in blocks of 32 keys and 16 columns.
// Both are put in an order that costs nothing later:
// - of 32 keys, 8 j + 2 t + i (j = 0..3, t = 0..3, i = 0, 1) comes to place 16 (j / 2) + 4 t + 2 (j % 2) + i: the
//   places at which a lane holds elements of the first operand are then the keys of which it holds scores.
// - of 16 columns the even ones come first: what a lane stores are then rows next to each other, which lie in
//   different banks. It ends up with columns 4 t to 4 t + 3 of O.
CUTE_DEVICE void transpose_tile(Element const* from, Element* to) {
  constexpr int kAcross = kHeadDimV / 16, kBlocks = kAcross * (kBlockN / 32);
  constexpr int kWide = kChunkV / 16;  // blocks side by side in a chunk of V
  // Blocks in flight: as many as the registers hold. With one, head_dim 256 runs at 0.55 of what it does without
  // any transposition, on an H200.
  constexpr int kBatch = kProducerRegisters < 40 ? 1 : kProducerRegisters < 56 ? 2 : 4;
  const int lane = threadIdx.x % 32;
  // A lane loads from key `lane`; it stores column `lane % 8`, even ones for lanes below 16, to either half.
  const uint32_t load_at = cast_smem_ptr_to_uint(from) + swizzled<kChunkV>(lane, 0);
  const uint32_t store_at = cast_smem_ptr_to_uint(to) + swizzled<kChunkN>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  CUTE_NO_UNROLL
  for (int first = threadIdx.x / 32 - (4 - kTransposers); first < kBlocks; first += kBatch * kTransposers) {
    uint32_t loaded[kBatch][4];
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int block = first + i * kTransposers, down = block / kAcross, across = block % kAcross;
      if (kBlocks % (kBatch * kTransposers) != 0 && block >= kBlocks) break;
      const uint32_t at = (load_at + across / kWide * (kBlockN * kChunkV) + down * (32 * kChunkV)) ^ (across % kWide * 16);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(loaded[i][0]), "=r"(loaded[i][1]), "=r"(loaded[i][2]), "=r"(loaded[i][3])
                   : "r"(at));
    }
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int block = first + i * kTransposers, down = block / kAcross, across = block % kAcross;
      if (kBlocks % (kBatch * kTransposers) != 0 && block >= kBlocks) break;
      const uint32_t at = (store_at + down * 32 / kChunkN * (kHeadDimV * kChunkN) + across * (16 * kChunkN)) ^
                          (down * 32 % kChunkN);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                   :
                   : "r"(at), "r"(__byte_perm(loaded[i][0], loaded[i][1], 0x6420)),
                     "r"(__byte_perm(loaded[i][2], loaded[i][3], 0x6420)),
                     "r"(__byte_perm(loaded[i][0], loaded[i][1], 0x7531)),
                     "r"(__byte_perm(loaded[i][2], loaded[i][3], 0x7531))
                   : "memory");
    }
  }
}

CUTE_DEVICE void transpose(Arguments const& args, Shared& shared) {
  Ring<kLandings> v_ring;
  Ring<kStages> vt_ring;
  Turn turn;
  while (turn.index < args.tiles) {
    const Keys keys = keys_of(args, tile_at(args, turn.index).m);
    CUTE_NO_UNROLL
    for (int left = keys.end - keys.begin; left > 0; --left) {
      Barrier::wait(&shared.v_full[v_ring.stage()], v_ring.parity());
      Barrier::wait(&shared.vt_empty[vt_ring.stage()], vt_ring.parity() ^ 1);
      transpose_tile(shared.v + v_ring.stage() * kBlockN * kColumnsV, shared.vt + vt_ring.stage() * kBlockN * kHeadDimV);
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      release_here(&shared.vt_full[vt_ring.stage()]);
      release(&shared.v_empty[v_ring.stage()]);
      v_ring.advance();
      vt_ring.advance();
    }
    if constexpr (!kPersistent) break;
    turn.advance(kDynamic ? drawn(shared, turn) : turn.index + gridDim.x);
  }
}

// Consumers ----------------------------------------------------------------------------------------


CUTE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh by exp2, with an absolute error of 1e-7: tanh.approx is off by 5e-4, which a cap of 50 turns into
// 2 % of a probability.
CUTE_DEVICE float tanh_fast(float x) {
  const float t = exp2_fast(2.0f * kLog2e * x);
  return 1.0f - __fdividef(2.0f, t + 1.0f);
}

// An accumulator as (rows of this thread, columns of this thread).
template <class Accumulator>
CUTE_DEVICE auto by_rows(Accumulator& acc) {
  auto l = acc.layout();
  return make_tensor(acc.data(), make_layout(make_layout(get<0, 1>(l), get<1>(l)),
                                             make_layout(get<0, 0>(l), get<0, 2>(l), get<2>(l))));
}

// Rows of this thread: 8 r + lane / 4 of its warp's 16.
constexpr int kRows = 2;

struct Softmax {
  float largest[kRows];  // what scores are taken relative to: the largest so far, or up to kSlack less
  float sum[kRows];      // of this thread's columns
};

// The largest score of each row, and of what `largest` holds.
template <class Scores>
CUTE_DEVICE void find_largest(Scores const& scores, float (&largest)[kRows]) {
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); ++j) largest[r] = fmaxf(largest[r], scores(r, j));
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffff, largest[r], 1));
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffff, largest[r], 2));
  }
}

// Whether a score of this thread may be more than `slack` above its row's `largest`. As integers, which are
// compared three at a time: right where the limit is not negative; else, it may. In four chains a row, for a warp
// waits for each: in a profile on an H200 one chain took 7 cycles a comparison.
template <class Scores>
CUTE_DEVICE bool outgrown(Scores const& scores, float const (&largest)[kRows], float slack) {
  constexpr int kColumns = decltype(size<1>(scores))::value, kChains = kColumns % 8 == 0 ? 4 : 2;
  bool found = false;
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int limit = __float_as_int(largest[r] + slack);
    int top[kChains];
    CUTE_UNROLL
    for (int c = 0; c < kChains; ++c) top[c] = limit;
    CUTE_UNROLL
    for (int j = 0; j < kColumns; j += 2) {
      int& chain = top[j / 2 % kChains];
      chain = __vimax3_s32(chain, __float_as_int(scores(r, j)), __float_as_int(scores(r, j + 1)));
    }
    CUTE_UNROLL
    for (int c = 1; c < kChains; ++c) top[0] = max(top[0], top[c]);
    found = found || limit < 0 || top[0] > limit;
  }
  return found;
}

// Scores become probabilities times 2^kLog2PFactor; returns in `rescale` what the sums so far, and so O, must be multiplied with, and whether
// that is other than 1 for any row of the warp.
//
// The largest score need not be known exactly, for a power of two more or less in P and the sums changes neither O
// nor lse: it is looked for only where a row of the warp may have outgrown what P has room for. That rescales O once or
// twice a tile of queries in place of once an iteration (FlashAttention-4, arXiv 2603.05451), and leaves
// the maximum to integers.
template <bool kFirst, bool kMasked, class Scores>
CUTE_DEVICE bool softmax_step(Scores&& scores, Softmax& state, float scale_log2, float slack, float (&rescale)[kRows]) {
  constexpr int kColumns = decltype(size<1>(scores))::value;
  float largest[kRows];
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) largest[r] = kFirst ? -INFINITY : state.largest[r];
  bool moved = !kFirst;
  if constexpr (kSlack > 0.0f && !kFirst) {
    moved = __any_sync(0xffffffff, outgrown(scores, state.largest, slack));
    if (moved) find_largest(scores, largest);
  } else {
    find_largest(scores, largest);
  }
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    // A row that has seen no key yet has -inf, of which no difference can be taken.
    const float base = (kMasked || kLocal) && largest[r] == -INFINITY ? 0.0f : largest[r] * scale_log2;
    if constexpr (!kFirst) {
      rescale[r] = exp2_fast(state.largest[r] * scale_log2 - base);
      if (kSlack == 0.0f || moved) state.sum[r] *= rescale[r];
    }
    state.largest[r] = largest[r];
    const float shift = base - kLog2PFactor;
    float sum = 0.0f;
    CUTE_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      scores(r, j) = exp2_fast(scores(r, j) * scale_log2 - shift);
      sum += scores(r, j);
    }
    state.sum[r] = kFirst ? sum : state.sum[r] + sum;
  }
  return moved;
}

// O, or what there is of it, in terms of the new base.
template <class Out>
CUTE_DEVICE void rescale_rows(Out&& rows, float const (&rescale)[kRows]) {
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(rows); ++j) rows(r, j) *= rescale[r];
  }
}

// Hides what a row does not see. `row` and `column` are this thread's first, in the keys' coordinates.
template <class Scores>
CUTE_DEVICE void mask(Scores&& scores, Arguments const& args, int row, int column) {
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int end = args.seqlen_k - column, begin = 0;
    if constexpr (kCausal || kLocal) end = min(end, row + 8 * r + 1 + (kLocal ? args.window_right : 0) - column);
    if constexpr (kLocal) begin = row + 8 * r - args.window_left - column;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); ++j) {
      const int at = j / 2 * 8 + j % 2;
      if (at >= end || (kLocal && at < begin)) scores(r, j) = -INFINITY;
    }
  }
}

// Four numbers to e4m3, the first in the lowest byte.
CUTE_DEVICE uint32_t to_e4m3(float a, float b, float c, float d) {
  uint32_t packed;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// m64n96k32, the first operand in shared memory.
struct AtomQK {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[48];

  CUTE_DEVICE static void fma(uint64_t const& a0, uint64_t const& b, float& c0, float& c1, float& c2, float& c3, float& c4, float& c5, float& c6, float& c7, float& c8, float& c9, float& c10, float& c11, float& c12, float& c13, float& c14, float& c15, float& c16, float& c17, float& c18, float& c19, float& c20, float& c21, float& c22, float& c23, float& c24, float& c25, float& c26, float& c27, float& c28, float& c29, float& c30, float& c31, float& c32, float& c33, float& c34, float& c35, float& c36, float& c37, float& c38, float& c39, float& c40, float& c41, float& c42, float& c43, float& c44, float& c45, float& c46, float& c47,
                              GMMA::ScaleOut accumulate = GMMA::ScaleOut::One) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "%48, "
        "%49, p, 1, 1;\n}\n"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3), "+f"(c4), "+f"(c5), "+f"(c6), "+f"(c7), "+f"(c8), "+f"(c9), "+f"(c10), "+f"(c11), "+f"(c12), "+f"(c13), "+f"(c14), "+f"(c15), "+f"(c16), "+f"(c17), "+f"(c18), "+f"(c19), "+f"(c20), "+f"(c21), "+f"(c22), "+f"(c23), "+f"(c24), "+f"(c25), "+f"(c26), "+f"(c27), "+f"(c28), "+f"(c29), "+f"(c30), "+f"(c31), "+f"(c32), "+f"(c33), "+f"(c34), "+f"(c35), "+f"(c36), "+f"(c37), "+f"(c38), "+f"(c39), "+f"(c40), "+f"(c41), "+f"(c42), "+f"(c43), "+f"(c44), "+f"(c45), "+f"(c46), "+f"(c47)
        : "l"(a0), "l"(b), "r"(int32_t(accumulate)));
  }
};

template <>
struct cute::MMA_Traits<AtomQK> {
  using ValTypeD = float;
  using ValTypeA = float_e4m3_t;
  using ValTypeB = float_e4m3_t;
  using ValTypeC = float;
  using FrgTypeA = GMMA::smem_desc<GMMA::Major::K>;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::K>;
  using Shape_MNK = Shape<_64, Int<96>, _32>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ABLayout<64, 32>;
  using BLayout = GMMA::ABLayout<96, 32>;
  using CLayout = GMMA::CLayout_64xN<96>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};

// m64n128k32, the first operand in registers.
struct AtomPV {
  using DRegisters = void;
  using ARegisters = uint32_t[4];
  using BRegisters = uint64_t[1];
  using CRegisters = float[64];

  CUTE_DEVICE static void fma(uint32_t const& a0, uint32_t const& a1, uint32_t const& a2, uint32_t const& a3, uint64_t const& b, float& c0, float& c1, float& c2, float& c3, float& c4, float& c5, float& c6, float& c7, float& c8, float& c9, float& c10, float& c11, float& c12, float& c13, float& c14, float& c15, float& c16, float& c17, float& c18, float& c19, float& c20, float& c21, float& c22, float& c23, float& c24, float& c25, float& c26, float& c27, float& c28, float& c29, float& c30, float& c31, float& c32, float& c33, float& c34, float& c35, float& c36, float& c37, float& c38, float& c39, float& c40, float& c41, float& c42, float& c43, float& c44, float& c45, float& c46, float& c47, float& c48, float& c49, float& c50, float& c51, float& c52, float& c53, float& c54, float& c55, float& c56, float& c57, float& c58, float& c59, float& c60, float& c61, float& c62, float& c63,
                              GMMA::ScaleOut accumulate = GMMA::ScaleOut::One) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{ %64, %65, %66, %67 }, "
        "%68, p, 1, 1;\n}\n"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3), "+f"(c4), "+f"(c5), "+f"(c6), "+f"(c7), "+f"(c8), "+f"(c9), "+f"(c10), "+f"(c11), "+f"(c12), "+f"(c13), "+f"(c14), "+f"(c15), "+f"(c16), "+f"(c17), "+f"(c18), "+f"(c19), "+f"(c20), "+f"(c21), "+f"(c22), "+f"(c23), "+f"(c24), "+f"(c25), "+f"(c26), "+f"(c27), "+f"(c28), "+f"(c29), "+f"(c30), "+f"(c31), "+f"(c32), "+f"(c33), "+f"(c34), "+f"(c35), "+f"(c36), "+f"(c37), "+f"(c38), "+f"(c39), "+f"(c40), "+f"(c41), "+f"(c42), "+f"(c43), "+f"(c44), "+f"(c45), "+f"(c46), "+f"(c47), "+f"(c48), "+f"(c49), "+f"(c50), "+f"(c51), "+f"(c52), "+f"(c53), "+f"(c54), "+f"(c55), "+f"(c56), "+f"(c57), "+f"(c58), "+f"(c59), "+f"(c60), "+f"(c61), "+f"(c62), "+f"(c63)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int32_t(accumulate)));
  }
};

template <>
struct cute::MMA_Traits<AtomPV> {
  using ValTypeD = float;
  using ValTypeA = float_e4m3_t;
  using ValTypeB = float_e4m3_t;
  using ValTypeC = float;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::K>;
  using Shape_MNK = Shape<_64, Int<128>, _32>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ALayout_64x32;
  using BLayout = GMMA::ABLayout<128, 32>;
  using CLayout = GMMA::CLayout_64xN<128>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};


using Warpgroups = Layout<Shape<Int<kConsumers>, _1, _1>>;
using MmaQK = decltype(make_tiled_mma(AtomQK{}, Warpgroups{}));
using MmaPV = decltype(make_tiled_mma(AtomPV{}, Warpgroups{}));

CUTE_DEVICE void consume(Arguments const& args, Shared& shared, int warpgroup) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  MmaQK mma_qk;
  MmaPV mma_pv;
  auto slice_qk = mma_qk.get_slice(warpgroup * 128 + thread);
  auto slice_pv = mma_pv.get_slice(warpgroup * 128 + thread);

  Tensor q_shared = make_tensor(make_smem_ptr(shared.q), LayoutQ{});
  Tensor k_shared = make_tensor(make_smem_ptr(shared.k), LayoutK{});
  Tensor vt_shared = make_tensor(make_smem_ptr(shared.vt), LayoutVt{});
  Tensor q_operand = slice_qk.partition_fragment_A(q_shared);
  Tensor k_operand = slice_qk.partition_fragment_B(k_shared);
  Tensor vt_operand = slice_pv.partition_fragment_B(vt_shared);

  Tensor out = partition_fragment_C(mma_pv, Shape<Int<kBlockM>, Int<kHeadDimV>>{});
  // P as the first operand of PV. Its keys are in the order of `transpose_tile`.
  Tensor p = make_tensor<Element>(Layout<Shape<Shape<_4, _2, _2>, _1, Int<kBlockN / 32>>>{});
  Tensor p_words = recast<uint32_t>(p);

  Ring<kStages> k_ring, vt_ring;
  if (kPingpong && warpgroup + 1 == kConsumers) end_turn(warpgroup);  // the first may begin

  Turn turn;
  while (turn.index < args.tiles) {
    const Place tile = tile_at(args, turn.index);
    const Keys keys = keys_of(args, tile.m);
    const int first_row = tile.m * kBlockM + warpgroup * 64 + warp * 16 + lane / 4;
    const int offset = args.seqlen_k - args.seqlen_q;
    const int kv_pair = tile.batch * args.num_kv_heads + tile.head / args.group_size;
    const auto descale = [&](float const* of) { return of == nullptr ? 1.0f : __ldg(of + kv_pair); };
    const float scale = args.softmax_scale * descale(args.q_descale) * descale(args.k_descale);
    const float scale_log2 = (kSoftcap ? args.softcap : scale) * kLog2e;
    const float into_cap = kSoftcap ? scale / args.softcap : 0.0f;
    Softmax state;
    float rescale[kRows];
    clear(out);
    Barrier::wait(&shared.q_full[warpgroup], turn.slot());

    if (keys.end > keys.begin) {
      // The scores of a tile, as far as they need no other warpgroup.
      const auto finish_scores = [&](auto& scores, int n, auto masked) {
        auto rows = by_rows(scores);
        if constexpr (kSoftcap) {
          CUTE_UNROLL
          for (int i = 0; i < size(scores); ++i) scores(i) = tanh_fast(scores(i) * into_cap);
        }
        if constexpr (decltype(masked)::value) {
          if (n >= keys.right || n < keys.left) mask(rows, args, first_row + offset, n * kBlockN + lane % 4 * 2);
        }
      };
      const auto round_p = [&](auto const& scores, auto& words) {
        CUTE_UNROLL
        for (int i = 0; i < size(words); ++i) {  // word i: row i % 2, keys 16 (i / 2) + 2 t and 8 further on
          const int at = i / 2 * 8 + i % 2 * 2;
          words(i) = to_e4m3(scores(at), scores(at + 1), scores(at + 4), scores(at + 5));
        }
      };
      const auto issue_qk = [&](auto& scores) {
        Barrier::wait(&shared.k_full[k_ring.stage()], k_ring.parity());
        wait_turn(warpgroup);
        issue<true>(mma_qk, q_operand, k_operand(_, _, _, k_ring.stage()), scores);
      };
      const auto issue_pv = [&] {
        Barrier::wait(&shared.vt_full[vt_ring.stage()], vt_ring.parity());
        issue<false>(mma_pv, p, vt_operand(_, _, _, vt_ring.stage()), out);
      };
      const auto release_k = [&] { release(&shared.k_empty[k_ring.stage()]); k_ring.advance(); };
      const auto release_vt = [&] { release_here(&shared.vt_empty[vt_ring.stage()]); vt_ring.advance(); };
      int n = keys.end - 1;
      {
        Tensor scores = partition_fragment_C(mma_qk, Shape<Int<kBlockM>, Int<kBlockN>>{});
        issue_qk(scores);
        end_turn(warpgroup);
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
        release_k();
        finish_scores(scores, n, true_type{});
        softmax_step<true, true>(by_rows(scores), state, scale_log2, kSlack, rescale);
        round_p(scores, p_words);
      }
      const auto step = [&](int n, auto masked) {
        Tensor scores = partition_fragment_C(mma_qk, Shape<Int<kBlockM>, Int<kBlockN>>{});
        if constexpr (kOverlap) {
          issue_qk(scores);
          issue_pv();
          end_turn(warpgroup);
          warpgroup_wait<1>();
          warpgroup_fence_operand(scores);
          release_k();
          finish_scores(scores, n, masked);
          softmax_step<false, decltype(masked)::value>(by_rows(scores), state, scale_log2, kSlack, rescale);
          warpgroup_wait<0>();
          warpgroup_fence_operand(out);
          release_vt();
          round_p(scores, p_words);
          rescale_rows(by_rows(out), rescale);
        } else {
          issue_pv();
          warpgroup_wait<0>();
          warpgroup_fence_operand(out);
          release_vt();
          issue_qk(scores);
          end_turn(warpgroup);
          warpgroup_wait<0>();
          warpgroup_fence_operand(scores);
          release_k();
          finish_scores(scores, n, masked);
          softmax_step<false, decltype(masked)::value>(by_rows(scores), state, scale_log2, kSlack, rescale);
          round_p(scores, p_words);
          rescale_rows(by_rows(out), rescale);
        }
      };
      --n;
      if constexpr (kCausal || kLocal) {
        for (; n >= max(keys.right, keys.begin); --n) step(n, true_type{});
      }
      for (; n >= (kLocal ? max(keys.left, keys.begin) : 0); --n) step(n, false_type{});
      if constexpr (kLocal) {
        for (; n >= keys.begin; --n) step(n, true_type{});
      }
      release_here(&shared.q_empty[warpgroup]);
      issue_pv();
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      release_vt();
    } else {
      release_here(&shared.q_empty[warpgroup]);
    }

    // Rows that saw nothing: sum 0, out 0, lse -inf.
    const float v_descale = descale(args.v_descale);
    const int t = lane % 4;
    __nv_bfloat16* const out_rows = args.out + tile.batch * args.out_stride_batch + tile.head * args.out_stride_head + 4 * t;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float sum = keys.end > keys.begin ? state.sum[r] : 0.0f;
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      const float factor = sum > 0.0f ? __fdividef(v_descale, sum) : 0.0f;
      const int row = first_row + 8 * r;
      if (row >= args.seqlen_q) continue;
      if (args.lse != nullptr && t == 0) {
        args.lse[(int64_t(tile.batch) * args.num_heads + tile.head) * args.seqlen_q + row] =
            sum > 0.0f ? (state.largest[r] * scale_log2 - kLog2PFactor) * kLn2 + __logf(sum) : -INFINITY;
      }
      __nv_bfloat16* const to = out_rows + row * args.out_stride_seq;
      CUTE_UNROLL
      for (int c = 0; c < kHeadDimV; c += 16) {  // columns c + 4 t to c + 4 t + 3; four lanes fill 32 bytes
        const int at = c / 2 + 2 * r;
        __nv_bfloat162 low = __floats2bfloat162_rn(out(at) * factor, out(at + 4) * factor);
        __nv_bfloat162 high = __floats2bfloat162_rn(out(at + 1) * factor, out(at + 5) * factor);
        *reinterpret_cast<uint2*>(to + c) = {reinterpret_cast<uint32_t&>(low), reinterpret_cast<uint32_t&>(high)};
      }
    }
    if constexpr (!kPersistent) break;
    turn.advance(kDynamic ? drawn(shared, turn) : turn.index + gridDim.x);
  }
}

#endif  // __CUDA_ARCH__

__global__ void __launch_bounds__(kThreads, kConsumers == 1 ? 2 : 1) fwd_kernel(__grid_constant__ const Arguments args) {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      Barrier::init(&shared.k_full[s], 1);
      Barrier::init(&shared.k_empty[s], 4 * kConsumers * kCluster);  // a lane of every warp
      Barrier::init(&shared.vt_full[s], kTransposers);
      Barrier::init(&shared.vt_empty[s], 4 * kConsumers);
    }
    for (int s = 0; s < kLandings; ++s) {
      Barrier::init(&shared.v_full[s], 1);
      Barrier::init(&shared.v_empty[s], kTransposers * kCluster);
    }
    for (int w = 0; w < kConsumers; ++w) {
      Barrier::init(&shared.q_full[w], 1);
      Barrier::init(&shared.q_empty[w], 4);
    }
    for (int i = 0; i < 2; ++i) {
      Barrier::init(&shared.drawn_full[i], 1);
      Barrier::init(&shared.drawn_empty[i], 4 * kConsumers + kTransposers);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  const int warp = __shfl_sync(0xffffffff, int(threadIdx.x) / 32, 0);
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp >= 4 - kTransposers) {
      transpose(args, shared);
    } else if (threadIdx.x == 0) {
      produce(args, shared);
    }
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume(args, shared, warp / 4 - 1);
  }
  if constexpr (kCluster > 1) {  // a block must be there while another signals its barriers
    cute::cluster_arrive();
    cute::cluster_wait();
  }
#endif
}

// Launcher -----------------------------------------------------------------------------------------


using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*, cuuint64_t const*,
                            cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<Encode>(found);
}

// What a TMA descriptor is made from: a tensor (head_dim, seqlen, heads, batch) and the box to move.
struct Shape4 {
  const void* address;
  int64_t extent[4], stride[3];  // strides in elements
  int columns, rows;

  bool operator==(Shape4 const& other) const {
    bool equal = address == other.address && columns == other.columns && rows == other.rows;
    for (int i = 0; i < 4; ++i) equal = equal && extent[i] == other.extent[i];
    for (int i = 0; i < 3; ++i) equal = equal && stride[i] == other.stride[i];
    return equal;
  }
};

// Descriptors are kept by what they are made from: to make one takes a few hundred nanoseconds.
static bool descriptor(CUtensorMap& map, Shape4 const& shape) {
  struct Entry { Shape4 shape; CUtensorMap map; };
  constexpr int kEntries = 64;
  static thread_local Entry entries[kEntries];
  const auto mixed = (reinterpret_cast<uint64_t>(shape.address) >> 4) * 0x9E3779B97F4A7C15ull + shape.rows * 31 + shape.extent[1];
  Entry& entry = entries[(mixed >> 40) % kEntries];
  if (!(entry.shape == shape) || shape.address == nullptr) {
    static const Encode encode = find_encode();
    if (encode == nullptr) return false;
    cuuint64_t extents[4], strides[3];
    for (int i = 0; i < 4; ++i) extents[i] = cuuint64_t(shape.extent[i] > 0 ? shape.extent[i] : 1);
    // The stride of a dimension of one element is whatever its owner left there.
    for (int i = 0; i < 3; ++i) strides[i] = extents[i + 1] > 1 ? shape.stride[i] * kElementBytes : 16;
    const cuuint32_t box[4] = {cuuint32_t(shape.columns), cuuint32_t(shape.rows), 1, 1}, steps[4] = {1, 1, 1, 1};
    const int row_bytes = shape.columns * kElementBytes;
    const auto swizzle = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_32B;
    if (encode(&entry.map, kElementType, 4, const_cast<void*>(shape.address), extents, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
      entry.shape.address = nullptr;
      return false;
    }
    entry.shape = shape;
  }
  map = entry.map;
  return true;
}

// The counter from which blocks draw tiles. Launches that may run side by side must not share one: each stream
// has its own. Null: a graph is being captured, which may be launched on any stream, or this stream is the
// per-thread default (one handle for many streams), or there are more streams than counters.
constexpr int kCounters = 128, kDevices = 64;
__device__ unsigned counters[kCounters];

static unsigned* counter_of(cudaStream_t stream) {
  static std::atomic<uintptr_t> owners[kDevices][kCounters];
  static std::atomic<unsigned*> addresses[kDevices];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  int device = 0;
  if (stream == cudaStreamPerThread || cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return nullptr;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone) return nullptr;
  unsigned* address = addresses[device].load();
  if (address == nullptr) {
    if (cudaGetSymbolAddress(reinterpret_cast<void**>(&address), counters) != cudaSuccess) return nullptr;
    addresses[device].store(address);
  }
  const uintptr_t owner = reinterpret_cast<uintptr_t>(stream) + 1;  // the default stream's handle is 0
  for (int i = 0; i < kCounters; ++i) {
    uintptr_t found = owners[device][i].load();
    if (found == 0 && owners[device][i].compare_exchange_strong(found, owner)) return address + i;
    if (found == owner) return address + i;
  }
  return nullptr;
}

// Multiprocessors of the current device; prepares the kernel for it the first time. 0: it cannot be.
static int multiprocessors(cudaError_t& error) {
  static int counts[kDevices];
  int device = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess || device >= kDevices) return 0;
  if (counts[device] == 0) {
    int count = 0;
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(fwd_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    }

    if (error != cudaSuccess) return 0;
    counts[device] = count;
  }
  return counts[device];
}

// Launches the kernel for arguments that are complete but for what says how the tiles are shared out.
static int start(Arguments& args, int sms, int batch, int num_kv_heads, cudaStream_t stream) {
  // In a cluster a last tile may lie beyond the rows: it loads its share and stores nothing.
  args.tiles_m = (args.seqlen_q + kBlockM * kCluster - 1) / (kBlockM * kCluster) * kCluster;
  args.num_head_batches = args.num_heads * batch;
  args.tiles = args.tiles_m * args.num_head_batches;

  constexpr int64_t kL2Share = 32 << 20;  // of 50 MB on Hopper: the rest is for Q, O and what is in flight
  const int64_t bytes_per_head = int64_t(args.seqlen_k) * (kHeadDim + kHeadDimV) * kElementBytes;
  const int64_t kv_heads = bytes_per_head == 0 ? num_kv_heads : kL2Share / bytes_per_head;
  const int64_t heads = (kv_heads < 1 ? 1 : kv_heads) * args.group_size;
  args.heads_per_section = int(heads < args.num_head_batches ? heads : args.num_head_batches);
  const int most = sms * kBlocksPerSM / kCluster * kCluster;
  args.counter = kDynamic && args.tiles > most ? counter_of(stream) : nullptr;
  // Without a counter, unequal tiles are best left to the hardware: a block for each.
  const bool one_each = !kPersistent || args.tiles <= most || (kDynamic && args.counter == nullptr);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(one_each ? args.tiles : most);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if constexpr (kCluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kCluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return int(cudaLaunchKernelEx(&config, fwd_kernel, args));
}

extern "C" int launch(const void* q, const void* k, const void* v, void* out, float* lse, const float* q_descale, const float* k_descale, const float* v_descale, void* workspace, int32_t batch, int32_t seqlen_q, int32_t seqlen_k, int32_t num_heads, int32_t num_kv_heads, int32_t window_left, int32_t window_right, int64_t q_stride_batch, int64_t q_stride_seq, int64_t q_stride_head, int64_t k_stride_batch, int64_t k_stride_seq, int64_t k_stride_head, int64_t v_stride_batch, int64_t v_stride_seq, int64_t v_stride_head, int64_t out_stride_batch, int64_t out_stride_seq, int64_t out_stride_head, float softcap, float softmax_scale, void* stream) {

  cudaError_t error = cudaSuccess;
  const int sms = multiprocessors(error);
  if (sms == 0) return error == cudaSuccess ? int(cudaErrorInvalidDevice) : int(error);
  if (batch == 0 || seqlen_q == 0) return 0;
  Arguments args;
  const bool made =
      descriptor(args.q, {q, {kHeadDim, seqlen_q, num_heads, batch}, {q_stride_seq, q_stride_head, q_stride_batch}, kChunkQK, 64}) &&
      (seqlen_k == 0 ||
       (descriptor(args.k, {k, {kHeadDim, seqlen_k, num_kv_heads, batch}, {k_stride_seq, k_stride_head, k_stride_batch}, kChunkQK, kBlockN / kCluster}) &&
        descriptor(args.v, {v, {kHeadDimV, seqlen_k, num_kv_heads, batch}, {v_stride_seq, v_stride_head, v_stride_batch}, kChunkV, kBlockN / kCluster})));
  if (!made) return int(cudaErrorInvalidValue);
  args.out = static_cast<__nv_bfloat16*>(out);
  args.out_stride_batch = out_stride_batch;
  args.out_stride_seq = out_stride_seq;
  args.out_stride_head = out_stride_head;
  args.lse = lse;
  args.q_descale = q_descale;
  args.k_descale = k_descale;
  args.v_descale = v_descale;
  args.seqlen_q = seqlen_q;
  args.seqlen_k = seqlen_k;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.group_size = num_heads / num_kv_heads;
  args.window_left = window_left;
  args.window_right = window_right;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  return start(args, sms, batch, num_kv_heads, static_cast<cudaStream_t>(stream));
}
