// Forward attention, bfloat16, head_dim 128, causal.
#include <cuda.h>
#include <cuda_runtime.h>
#include <cute/layout.hpp>

#include <atomic>
#include <cstdint>

constexpr int kHeadDim = 128, kHeadDimV = 128;
constexpr int kColumnsQK = 128, kColumnsV = 128;  // in shared memory, zero-filled
constexpr int kConsumers = 1, kThreads = 256, kBlocksPerSM = 2;
constexpr int kBlockM = 64, kBlockN = 80, kStages = 2, kLandings = kStages, kCluster = 1;
constexpr int kElementBytes = 2;
constexpr auto kElementType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
constexpr int kSharedBytes = 99328;
constexpr bool kPersistent = false, kDynamic = false;

// The width of a swizzled row of shared memory, in elements: also that of a TMA box.
constexpr int chunk_of(int columns) { return columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : 16; }
constexpr int kChunkQK = chunk_of(kColumnsQK), kChunkV = chunk_of(kColumnsV);

struct Arguments {
  CUtensorMap q, k, v, out;
  float* lse;
  int seqlen_q, seqlen_k, num_heads, group_size, window_left, window_right;
  int tiles_m, tiles, heads_per_section, num_head_batches;
  unsigned* counter;  // tiles drawn so far; null: each block takes every gridDim.x-th
  float softmax_scale, softcap;
  float* workspace;
  int parts;  // of the keys
};

// In the workspace, for every part and row: O before it is divided, relative to 2^top, and top and total as they are in
// the softmax. A row is (batch, head, position) as in lse. Where total is 0, nothing was seen and O is not there.
struct Partial {
  float *out, *top, *total;

  __host__ __device__ Partial(float* workspace, int parts, int64_t rows)
      : out(workspace), top(workspace + parts * rows * kHeadDimV), total(top + parts * rows) {}
  static int64_t bytes(int parts, int64_t rows) { return parts * rows * (kHeadDimV + 2) * int64_t(sizeof(float)); }
};

// Device code. The compiler's pass over the host's code needs none of it, which saves a third of its time. (It
// does need to know the variables that CuTe's headers define for the device: those of layout.hpp.)
#ifdef __CUDA_ARCH__
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

using namespace cute;

using Element = bfloat16_t;
constexpr bool kCausal = true, kLocal = false, kSoftcap = false;
constexpr bool kOverlap = true, kPingpong = false, kTurnEndsDone = false, kPInRegisters = true;
constexpr bool kHeadsShareL2 = false;
constexpr int kConsumerRegisters = 224, kProducerRegisters = 32;

constexpr float kLog2e = 1.4426950408889634f;
// P may grow to 2^8 before it, and O, are taken relative to a new largest score: sums are of float32, and P rounds
// as well at 256 as at 1.
constexpr float kSlack = 8.0f, kLog2PFactor = 0.0f;

// Shared memory ----------------------------------------------------------------------------------

// A tile is stored in chunks of as many columns as one swizzled row holds.
template <int kColumns>
using KMajorAtom = conditional_t<chunk_of(kColumns) == 64, GMMA::Layout_K_SW128_Atom<Element>,
                   conditional_t<chunk_of(kColumns) == 32, GMMA::Layout_K_SW64_Atom<Element>,
                                 GMMA::Layout_K_SW32_Atom<Element>>>;
template <int kColumns>
using MNMajorAtom = conditional_t<chunk_of(kColumns) == 64, GMMA::Layout_MN_SW128_Atom<Element>,
                    conditional_t<chunk_of(kColumns) == 32, GMMA::Layout_MN_SW64_Atom<Element>,
                                  GMMA::Layout_MN_SW32_Atom<Element>>>;

using LayoutQ = decltype(tile_to_shape(KMajorAtom<kColumnsQK>{}, Shape<Int<kBlockM>, Int<kColumnsQK>>{}));
using LayoutO = decltype(tile_to_shape(KMajorAtom<kColumnsV>{}, Shape<Int<kBlockM>, Int<kColumnsV>>{}));
using LayoutP = decltype(tile_to_shape(KMajorAtom<kBlockN>{}, Shape<Int<kBlockM>, Int<kBlockN>>{}));
using LayoutK = decltype(tile_to_shape(KMajorAtom<kColumnsQK>{}, Shape<Int<kBlockN>, Int<kColumnsQK>, Int<kStages>>{}));
// V as PV reads it, (head_dim_v, keys): the same bytes as rows of keys, transposed.
using LayoutVt = decltype(tile_to_shape(MNMajorAtom<kColumnsV>{}, Shape<Int<kColumnsV>, Int<kBlockN>, Int<kStages>>{},
                                        Step<_2, _1, _3>{}));
constexpr bool kOReplacesQ = true;

struct alignas(1024) Shared {
  alignas(1024) Element k[kStages * kBlockN * kColumnsQK];
  alignas(1024) Element v[kStages * kBlockN * kColumnsV];
  alignas(1024) Element q[kBlockM * kColumnsQK];
  alignas(1024) Element o[kOReplacesQ ? 0 : kBlockM * kColumnsV];
  alignas(1024) Element p[kPInRegisters ? 0 : kBlockM * kBlockN];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
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
  index /= args.parts;  // blocks next to each other take parts of the same keys

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
  const int part = blockIdx.x % args.parts, share = (max(keys.end - keys.begin, 0) + args.parts - 1) / args.parts;
  keys.end -= part * share;
  keys.begin = max(keys.begin, keys.end - share);

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

// Scores become probabilities; returns in `rescale` what the sums so far, and so O, must be multiplied with, and whether
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

using TileQK = Shape<Int<kBlockM>, Int<kBlockN>, Int<kColumnsQK>>;
using TilePV = Shape<Int<kBlockM>, Int<kColumnsV>, Int<kBlockN>>;
// m64n80k16, the first operand in shared memory.
struct AtomQK {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[40];

  CUTE_DEVICE static void fma(uint64_t const& a0, uint64_t const& b, float& c0, float& c1, float& c2, float& c3, float& c4, float& c5, float& c6, float& c7, float& c8, float& c9, float& c10, float& c11, float& c12, float& c13, float& c14, float& c15, float& c16, float& c17, float& c18, float& c19, float& c20, float& c21, float& c22, float& c23, float& c24, float& c25, float& c26, float& c27, float& c28, float& c29, float& c30, float& c31, float& c32, float& c33, float& c34, float& c35, float& c36, float& c37, float& c38, float& c39,
                              GMMA::ScaleOut accumulate = GMMA::ScaleOut::One) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, "
        "%40, "
        "%41, p, 1, 1, 0, 0;\n}\n"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3), "+f"(c4), "+f"(c5), "+f"(c6), "+f"(c7), "+f"(c8), "+f"(c9), "+f"(c10), "+f"(c11), "+f"(c12), "+f"(c13), "+f"(c14), "+f"(c15), "+f"(c16), "+f"(c17), "+f"(c18), "+f"(c19), "+f"(c20), "+f"(c21), "+f"(c22), "+f"(c23), "+f"(c24), "+f"(c25), "+f"(c26), "+f"(c27), "+f"(c28), "+f"(c29), "+f"(c30), "+f"(c31), "+f"(c32), "+f"(c33), "+f"(c34), "+f"(c35), "+f"(c36), "+f"(c37), "+f"(c38), "+f"(c39)
        : "l"(a0), "l"(b), "r"(int32_t(accumulate)));
  }
};

template <>
struct cute::MMA_Traits<AtomQK> {
  using ValTypeD = float;
  using ValTypeA = bfloat16_t;
  using ValTypeB = bfloat16_t;
  using ValTypeC = float;
  using FrgTypeA = GMMA::smem_desc<GMMA::Major::K>;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::K>;
  using Shape_MNK = Shape<_64, Int<80>, _16>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ABLayout<64, 16>;
  using BLayout = GMMA::ABLayout<80, 16>;
  using CLayout = GMMA::CLayout_64xN<80>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};


using AtomPV = conditional_t<
    kPInRegisters, decltype(GMMA::rs_op_selector<Element, Element, float, TilePV, GMMA::Major::K, GMMA::Major::MN>()),
    decltype(GMMA::ss_op_selector<Element, Element, float, TilePV, GMMA::Major::K, GMMA::Major::MN>())>;
using Warpgroups = Layout<Shape<Int<kConsumers>, _1, _1>>;
using MmaQK = decltype(make_tiled_mma(AtomQK{}, Warpgroups{}));
using MmaPV = decltype(make_tiled_mma(AtomPV{}, Warpgroups{}));

CUTE_DEVICE void sync_warpgroup(int warpgroup) { cutlass::arch::NamedBarrier::sync(128, uint32_t(5 + warpgroup)); }

CUTE_DEVICE void consume(Arguments const& args, Shared& shared, int warpgroup) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  MmaQK mma_qk;
  MmaPV mma_pv;
  auto slice_qk = mma_qk.get_slice(warpgroup * 128 + thread);
  auto slice_pv = mma_pv.get_slice(warpgroup * 128 + thread);

  Tensor q_shared = make_tensor(make_smem_ptr(shared.q), LayoutQ{});
  Tensor k_shared = make_tensor(make_smem_ptr(shared.k), LayoutK{});
  Tensor v_shared = make_tensor(make_smem_ptr(shared.v), LayoutVt{});
  Tensor p_shared = make_tensor(make_smem_ptr(shared.p), LayoutP{});
  Element* const o_bytes = kOReplacesQ ? shared.q : shared.o;
  Tensor o_shared = make_tensor(make_smem_ptr(o_bytes), LayoutO{});
  Tensor q_operand = slice_qk.partition_fragment_A(q_shared);
  Tensor k_operand = slice_qk.partition_fragment_B(k_shared);
  Tensor v_operand = slice_pv.partition_fragment_B(v_shared);

  Tensor out = partition_fragment_C(mma_pv, Shape<Int<kBlockM>, Int<kColumnsV>>{});
  // P as the first operand of PV: an accumulator's registers in the same order.
  Tensor p = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kBlockN / 16>>>{});
  Tensor p_operand = slice_pv.partition_fragment_A(p_shared);
  auto store_p = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, mma_qk);
  Tensor p_target = store_p.get_slice(warpgroup * 128 + thread).partition_D(p_shared);

  const float scale_log2 = (kSoftcap ? args.softcap : args.softmax_scale) * kLog2e;
  const float into_cap = kSoftcap ? args.softmax_scale / args.softcap : 0.0f, slack = kSlack / scale_log2;

  Ring<kStages> k_ring, v_ring;
  bool k_known = false, v_known = false;  // to be full
  if (kPingpong && warpgroup + 1 == kConsumers) end_turn(warpgroup);  // the first may begin

  Turn turn;
  while (turn.index < args.tiles) {
    const Place tile = tile_at(args, turn.index);
    const Keys keys = keys_of(args, tile.m);
    const int warpgroup_row = tile.m * kBlockM + warpgroup * 64;
    const int first_row = warpgroup_row + warp * 16 + lane / 4;
    const int offset = args.seqlen_k - args.seqlen_q;
    Softmax state;
    float rescale[kRows];
    const auto release_q = [&] {
      sync_warpgroup(warpgroup);
      if (thread == 0) Barrier::arrive(&shared.q_empty[warpgroup]);
    };
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
        if constexpr (decltype(masked)::value) if (n >= keys.right || n < keys.left) mask(rows, args, first_row + offset, n * kBlockN + lane % 4 * 2);
      };
      const auto take_p = [&](auto& scores) {
        if constexpr (kPInRegisters) {
          CUTE_UNROLL
          for (int i = 0; i < size(p); i += 2) {
            if constexpr (is_same_v<Element, half_t>) {
              reinterpret_cast<__half2&>(p(i)) = __floats2half2_rn(scores(i), scores(i + 1));
            } else {
              reinterpret_cast<__nv_bfloat162&>(p(i)) = __floats2bfloat162_rn(scores(i), scores(i + 1));
            }
          }
        } else {
          Tensor low = make_tensor_like<Element>(scores);
          CUTE_UNROLL
          for (int i = 0; i < size(scores); ++i) low(i) = Element(scores(i));
          copy(store_p, store_p.get_slice(warpgroup * 128 + thread).retile_S(low), p_target);
          cutlass::arch::fence_view_async_shared();
          sync_warpgroup(warpgroup);
        }
      };
      const auto issue_qk = [&](auto& scores) {
        wait_full(shared.k_full, k_ring, k_known);
        wait_turn(warpgroup);
        issue<true>(mma_qk, q_operand, k_operand(_, _, _, k_ring.stage()), scores);
      };
      const auto issue_pv = [&] {
        wait_full(shared.v_full, v_ring, v_known);
        if constexpr (kPInRegisters) {
          issue<false>(mma_pv, p, v_operand(_, _, _, v_ring.stage()), out);
        } else {
          issue<false>(mma_pv, p_operand, v_operand(_, _, _, v_ring.stage()), out);
        }
      };
      const auto release_k = [&] {
        release(&shared.k_empty[k_ring.stage()]);
        k_ring.advance();
        k_known = is_full(shared.k_full, k_ring);
      };
      const auto release_v = [&] { release(&shared.v_empty[v_ring.stage()]); v_ring.advance(); };
      const auto rescale_out = [&](bool moved) {
        if (moved) rescale_rows(by_rows(out), rescale);
      };

      int n = keys.end - 1;
      v_known = false;
      {
        Tensor scores = partition_fragment_C(mma_qk, Shape<Int<kBlockM>, Int<kBlockN>>{});
        issue_qk(scores);
        if constexpr (!kTurnEndsDone) end_turn(warpgroup);
        warpgroup_wait<0>();
        if constexpr (kTurnEndsDone) end_turn(warpgroup);
        warpgroup_fence_operand(scores);
        release_k();
        finish_scores(scores, n, true_type{});
        softmax_step<true, true>(by_rows(scores), state, scale_log2, slack, rescale);
        take_p(scores);
      }
      const auto step = [&](int n, auto masked) {
        Tensor scores = partition_fragment_C(mma_qk, Shape<Int<kBlockM>, Int<kBlockN>>{});
        const auto finish_pv = [&] {
          warpgroup_wait<0>();
          warpgroup_fence_operand(out);
          release_v();
        };
        if constexpr (kOverlap) {
          issue_qk(scores);
          issue_pv();
          if constexpr (!kTurnEndsDone) end_turn(warpgroup);
          warpgroup_wait<1>();
        } else {
          issue_pv();
          finish_pv();
          issue_qk(scores);
          end_turn(warpgroup);
          warpgroup_wait<0>();
        }
        warpgroup_fence_operand(scores);
        release_k();
        if constexpr (kOverlap) {
          auto next = v_ring;
          next.advance();
          v_known = is_full(shared.v_full, next);
        }
        finish_scores(scores, n, masked);
        if constexpr (kTurnEndsDone) {
          finish_pv();
          end_turn(warpgroup);
        }
        const bool moved = softmax_step<false, decltype(masked)::value>(by_rows(scores), state, scale_log2, slack, rescale);
        if constexpr (kOverlap && !kTurnEndsDone) finish_pv();
        take_p(scores);
        rescale_out(moved);
      };
      --n;
      if constexpr (kCausal || kLocal) {
        for (; n >= max(keys.right, keys.begin); --n) step(n, true_type{});
      }
      for (; n >= (kLocal ? max(keys.left, keys.begin) : keys.begin); --n) step(n, false_type{});
      if constexpr (kLocal) {
        for (; n >= keys.begin; --n) step(n, true_type{});
      }
      if constexpr (!kOReplacesQ) release_q();
      issue_pv();
      warpgroup_wait<0>();
      warpgroup_fence_operand(out);
      release_v();
    } else if constexpr (!kOReplacesQ) {
      release_q();
    }

    const Partial partial(args.workspace, args.parts, int64_t(args.num_head_batches) * args.seqlen_q);
    const int64_t first = (int64_t(blockIdx.x % args.parts) * args.num_head_batches + tile.batch * args.num_heads + tile.head) * args.seqlen_q;
    auto sums = by_rows(out);
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float sum = keys.end > keys.begin ? state.sum[r] : 0.0f;
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      const int row = first_row + 8 * r;
      if (row >= args.seqlen_q) continue;
      if (lane % 4 == 0) {
        partial.top[first + row] = state.largest[r] * scale_log2;
        partial.total[first + row] = sum;
      }
      if (sum == 0.0f) continue;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(sums); j += 2) {
        const int column = j / 2 * 8 + lane % 4 * 2;
        if (column < kHeadDimV) {
          *reinterpret_cast<float2*>(partial.out + (first + row) * kHeadDimV + column) = {sums(r, j), sums(r, j + 1)};
        }
      }
    }
    break;

  }
  if (thread == 0) tma_store_wait<0>();
}

#endif  // __CUDA_ARCH__

__global__ void __launch_bounds__(kThreads, kConsumers == 1 ? 2 : 1) fwd_kernel(__grid_constant__ const Arguments args) {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      Barrier::init(&shared.k_full[s], 1);
      Barrier::init(&shared.v_full[s], 1);
      Barrier::init(&shared.k_empty[s], 4 * kConsumers * kCluster);  // a lane of every warp
      Barrier::init(&shared.v_empty[s], 4 * kConsumers * kCluster);
    }
    for (int w = 0; w < kConsumers; ++w) {
      Barrier::init(&shared.q_full[w], 1);
      Barrier::init(&shared.q_empty[w], 1);
    }
    for (int i = 0; i < 2; ++i) {
      Barrier::init(&shared.drawn_full[i], 1);
      Barrier::init(&shared.drawn_empty[i], 4 * kConsumers);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  const int warpgroup = __shfl_sync(0xffffffff, int(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, shared);
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume(args, shared, warpgroup - 1);
  }
  if constexpr (kCluster > 1) {  // a block must be there while another signals its barriers
    cute::cluster_arrive();
    cute::cluster_wait();
  }
#endif
}

// Launcher -----------------------------------------------------------------------------------------


constexpr int kMostParts = 32;  // a lane for each

struct Combination {
  float* workspace;
  void* out;
  float* lse;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  int parts, rows, seqlen_q, num_heads;
};

// A warp for each row; parts in their order, so that sums are the same every time.
__global__ void __launch_bounds__(128) combine_kernel(Combination args) {
#ifdef __CUDA_ARCH__
  const int lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
  if (row >= args.rows) return;
  const Partial partial(args.workspace, args.parts, args.rows);
  const bool mine = lane < args.parts;
  const float total = mine ? partial.total[int64_t(lane) * args.rows + row] : 0.0f;
  float largest = total != 0.0f ? partial.top[int64_t(lane) * args.rows + row] : -INFINITY;
  const float top = largest;
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, mask));
  const float weight = total != 0.0f ? exp2_fast(top - largest) : 0.0f;
  float sum = weight * total;
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
  const float inverse = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;

  const int position = row % args.seqlen_q, head = row / args.seqlen_q % args.num_heads, batch = row / args.seqlen_q / args.num_heads;
  Element* const to = static_cast<Element*>(args.out) + batch * args.out_stride_batch + position * args.out_stride_seq +
                      head * args.out_stride_head;
  for (int c = lane * 4; c - lane * 4 < kHeadDimV; c += 128) {
    float4 out{0.0f, 0.0f, 0.0f, 0.0f};
    for (int part = 0; part < args.parts; ++part) {
      const float w = __shfl_sync(0xffffffff, weight, part);
      if (w == 0.0f || c >= kHeadDimV) continue;
      const float4 in = *reinterpret_cast<float4 const*>(partial.out + (int64_t(part) * args.rows + row) * kHeadDimV + c);
      out.x += w * in.x;
      out.y += w * in.y;
      out.z += w * in.z;
      out.w += w * in.w;
    }
    if (c >= kHeadDimV) continue;
    alignas(8) Element low[4] = {Element(out.x * inverse), Element(out.y * inverse), Element(out.z * inverse), Element(out.w * inverse)};
    *reinterpret_cast<uint2*>(to + c) = *reinterpret_cast<uint2*>(low);
  }
  if (lane == 0 && args.lse != nullptr) {
    args.lse[row] = sum > 0.0f ? (largest + __log2f(sum)) * 0.6931471805599453f : -INFINITY;
  }
#endif
}

// Into how many parts the keys are best divided. In units of the time that a block takes for a tile of keys: rounds of
// blocks, each with some two tiles to begin and end, and what is written and read again to combine the parts, which
// takes two tiles to launch.
static int parts_of(int sms, int batch, int seqlen_q, int seqlen_k, int num_heads) {
  constexpr double kOperationsPerSecond = 4.9e12, kBytesPerSecond = 3e12;  // a multiprocessor's and the memory's, on an H200
  constexpr double kTile = 2.0 * kBlockM * kBlockN * (kHeadDim + kHeadDimV) / kOperationsPerSecond;
  const int64_t rows = int64_t(batch) * num_heads * seqlen_q;
  const int64_t tiles = (seqlen_q + kBlockM - 1) / kBlockM * int64_t(batch) * num_heads;
  const int steps = (seqlen_k + kBlockN - 1) / kBlockN, slots = sms * kBlocksPerSM;
  int best = 1;
  double least = 0.0;
  for (int parts = 1; parts <= kMostParts && parts <= (steps > 1 ? steps : 1); ++parts) {
    const int64_t rounds = (tiles * parts + slots - 1) / slots;
    double cost = double(rounds) * ((steps + parts - 1) / parts + 2);
    if (parts > 1) cost += 2.0 + 2.0 * double(Partial::bytes(parts, rows)) / kBytesPerSecond / kTile;
    if (parts == 1 || cost < least) {
      least = cost;
      best = parts;
    }
  }
  return best;
}


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
    cudaFuncAttributes loaded;  // to have it loaded before a graph is captured
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&loaded, combine_kernel);

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
  args.tiles = args.tiles_m * args.num_head_batches * args.parts;

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

extern "C" int64_t workspace_bytes(int32_t batch, int32_t seqlen_q, int32_t seqlen_k, int32_t num_heads, int32_t num_kv_heads, int32_t window_left, int32_t window_right, int64_t q_stride_batch, int64_t q_stride_seq, int64_t q_stride_head, int64_t k_stride_batch, int64_t k_stride_seq, int64_t k_stride_head, int64_t v_stride_batch, int64_t v_stride_seq, int64_t v_stride_head, int64_t out_stride_batch, int64_t out_stride_seq, int64_t out_stride_head, float softcap) {
  cudaError_t error = cudaSuccess;
  const int sms = multiprocessors(error);
  if (sms == 0) return 0;  // which `launch` then reports
  return Partial::bytes(parts_of(sms, batch, seqlen_q, seqlen_k, num_heads), int64_t(batch) * num_heads * seqlen_q);
}

extern "C" int launch(const void* q, const void* k, const void* v, void* out, float* lse, void* workspace, int32_t batch, int32_t seqlen_q, int32_t seqlen_k, int32_t num_heads, int32_t num_kv_heads, int32_t window_left, int32_t window_right, int64_t q_stride_batch, int64_t q_stride_seq, int64_t q_stride_head, int64_t k_stride_batch, int64_t k_stride_seq, int64_t k_stride_head, int64_t v_stride_batch, int64_t v_stride_seq, int64_t v_stride_head, int64_t out_stride_batch, int64_t out_stride_seq, int64_t out_stride_head, float softcap, float softmax_scale, void* stream) {

  cudaError_t error = cudaSuccess;
  const int sms = multiprocessors(error);
  if (sms == 0) return error == cudaSuccess ? int(cudaErrorInvalidDevice) : int(error);
  if (batch == 0 || seqlen_q == 0) return 0;
  Arguments args;
  const bool made =
      descriptor(args.q, {q, {kHeadDim, seqlen_q, num_heads, batch}, {q_stride_seq, q_stride_head, q_stride_batch}, kChunkQK, 64}) &&
      descriptor(args.out, {out, {kHeadDimV, seqlen_q, num_heads, batch}, {out_stride_seq, out_stride_head, out_stride_batch}, kChunkV, 64}) &&
      (seqlen_k == 0 ||
       (descriptor(args.k, {k, {kHeadDim, seqlen_k, num_kv_heads, batch}, {k_stride_seq, k_stride_head, k_stride_batch}, kChunkQK, kBlockN / kCluster}) &&
        descriptor(args.v, {v, {kHeadDimV, seqlen_k, num_kv_heads, batch}, {v_stride_seq, v_stride_head, v_stride_batch}, kChunkV, kBlockN / kCluster})));
  if (!made) return int(cudaErrorInvalidValue);
  args.lse = lse;
  args.seqlen_q = seqlen_q;
  args.seqlen_k = seqlen_k;
  args.num_heads = num_heads;
  args.group_size = num_heads / num_kv_heads;
  args.window_left = window_left;
  args.window_right = window_right;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.workspace = static_cast<float*>(workspace);
  args.parts = parts_of(sms, batch, seqlen_q, seqlen_k, num_heads);
  const int failed = start(args, sms, batch, num_kv_heads, static_cast<cudaStream_t>(stream));
  if (failed != 0) return failed;
  const int rows = batch * num_heads * seqlen_q;
  combine_kernel<<<(rows + 3) / 4, 128, 0, static_cast<cudaStream_t>(stream)>>>(
      {args.workspace, out, lse, out_stride_batch, out_stride_seq, out_stride_head, args.parts, rows, seqlen_q, num_heads});
  return int(cudaGetLastError());
}
