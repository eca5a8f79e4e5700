// Attention forward for tensor cores of the Ampere kind, float16, head_dim 64, window.
//
// A thread block takes a tile of query rows and walks over tiles of keys, from the last one that
// any row sees to the first. Of the next tiles, K and V are on their way to shared memory by
// cp.async while the products of this one run.
//
//   row      a query row, or a (query row, head of the group) pair where the group is packed
//   tile     kBlockM rows or kBlockN keys
//   ring     the kStages tiles of K (and V) in shared memory
//   chunk    16 bytes: 8 elements of a row
// ---- Tiles and fragments -------------------------------------------------------------------

#include <cstdint>
#include <cuda_runtime.h>
#include <cute/layout.hpp>

// The compiler's pass over the host's code needs nothing of the device's, which saves up to a fifth of its time. (It does
// need to know the variables that CuTe's headers define for the device: those of layout.hpp.)
#ifdef __CUDA_ARCH__
#include <cute/tensor.hpp>
#endif

// Named: CuTe has a namespace without a name, and nvcc's host stub confuses it with ours.
namespace autoflash {

using namespace cute;

constexpr bool kAligned = true;  // addresses and strides are multiples of 16 bytes
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

#ifndef __CUDA_ARCH__
struct Element;  // the host has addresses of it
#else
using Element = cute::half_t;
// Each warp takes 16 rows out of 16 * kWarps; a taller tile repeats that, so that what a warp loads
// of K and V serves several row groups.
using Mma = TiledMMA<MMA_Atom<SM80_16x8x16_F32F16F16F32_TN>,
                     Layout<Shape<Int<kWarps>, _1, _1>>, Tile<Int<16 * kWarps>, _16, _16>>;

using LoadMatrix = Copy_Atom<SM75_U32x4_LDSM_N, Element>;
using LoadMatrixTransposed = Copy_Atom<SM75_U16x8_LDSM_T, Element>;

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// How kRows rows of kCols elements lie in shared memory. Eight rows of a 16-byte column must fall
// into different banks: 64 or 32 columns are swizzled, an odd multiple of 16 has its rows 8 apart.
template <int kRows, int kCols>
struct TileLayout {
  static constexpr bool kSwizzled = kCols % 32 == 0;
  static constexpr int kAtom = kCols % 64 == 0 ? 64 : 32;  // columns of the swizzled pattern
  static constexpr auto make() {
    if constexpr (kSwizzled) {
      return tile_to_shape(composition(Swizzle<kAtom == 64 ? 3 : 2, 3, 3>{},
                                       Layout<Shape<_8, Int<kAtom>>, Stride<Int<kAtom>, _1>>{}),
                           Shape<Int<kRows>, Int<kCols>>{});
    } else {
      return Layout<Shape<Int<kRows>, Int<kCols>>, Stride<Int<kCols + 8>, _1>>{};
    }
  }
  using Type = decltype(make());
  static constexpr int kElements = kRows * (kSwizzled ? kCols : kCols + 8);

  // Calls f(row, more rows, column, place) for each 16 bytes of the tile that are this thread's:
  // those of row + more rows. Only `row` and `column` depend on the thread, where rows are swizzled.
  template <class F>
  CUTE_DEVICE static void for_each_chunk(F f) {
    constexpr int kPerRow = (kSwizzled ? kAtom : kCols) / 8;
    int thread = threadIdx.x;
    if constexpr (kSwizzled) {
      constexpr int kStep = kThreads / kPerRow;
      static_assert(kStep % 8 == 0, "the swizzle repeats every 8 rows");
      int row = thread / kPerRow, col = thread % kPerRow * 8;
      int place = Type{}(row, col);
      CUTE_UNROLL
      for (int i = 0; i < kRows; i += kStep) {
        if (kRows % kStep != 0 && row + i >= kRows) break;
        CUTE_UNROLL
        for (int j = 0; j < kCols; j += kAtom) f(row, i, col + j, place + i * kAtom + j * kRows);
      }
    } else {
      constexpr int kChunks = kRows * kPerRow;
      CUTE_UNROLL
      for (int i = 0; i < kChunks; i += kThreads) {
        int chunk = thread + i;
        if (kChunks % kThreads != 0 && chunk >= kChunks) break;
        int row = chunk / kPerRow, col = chunk % kPerRow * 8;
        f(row, 0, col, row * (kCols + 8) + col);
      }
    }
  }
};

// 16 bytes from global to shared memory, or zeros. They arrive with the group that they are
// committed to; at an address of unknown alignment they are written at once.
template <bool kAlwaysInside>
CUTE_DEVICE void load_chunk(const Element* from, Element* to, bool inside) {
  if constexpr (!kAligned) {
    alignas(16) Element chunk[8];
    CUTE_UNROLL
    for (int e = 0; e < 8; ++e) chunk[e] = kAlwaysInside || inside ? from[e] : Element(0);
    *reinterpret_cast<uint128_t*>(to) = *reinterpret_cast<const uint128_t*>(chunk);
  } else {
    const uint128_t& source = *reinterpret_cast<const uint128_t*>(from);
    uint128_t& target = *reinterpret_cast<uint128_t*>(to);
    if constexpr (kAlwaysInside) {
      SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>::copy(source, target);
    } else {
      SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(source, target, inside);
    }
  }
}

// `count` rows of kUsed elements, `stride` apart, into a tile; what is beyond becomes zero.
template <int kRows, int kCols, int kUsed>
CUTE_DEVICE void load_rows(const Element* from, int64_t stride, int count, Element* tile) {
  auto load = [&](auto all_rows) {
    TileLayout<kRows, kCols>::for_each_chunk([&](int row, int more, int col, int place) {
      bool inside = (all_rows || row + more < count) && (kUsed == kCols || col < kUsed);
      load_chunk<all_rows && kUsed == kCols>(from + row * stride + col + more * stride,
                                             tile + place, inside);
    });
  };
  if (count >= kRows) {
    load(true_type{});
  } else {
    load(false_type{});
  }
}

// ---- Arithmetic ----------------------------------------------------------------------------

CUTE_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// By exp2 and a reciprocal: off by 3e-7, where tanh.approx is off by 5e-4.
CUTE_DEVICE float fast_tanh(float x) {
  constexpr float kTwiceLog2E = 2.8853900817779268f;
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + fast_exp2(x * kTwiceLog2E)));
  return fmaf(-2.0f, y, 1.0f);
}

// Two neighbouring elements in a word, the first one low.
CUTE_DEVICE uint32_t pack(float first, float second) {
  uint32_t word;
  if constexpr (is_same_v<Element, half_t>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
}

// The four threads that hold a row of an accumulator reduce over it.
template <class F>
CUTE_DEVICE float reduce_row(float x, F f) {
  x = f(x, __shfl_xor_sync(~0u, x, 1));
  return f(x, __shfl_xor_sync(~0u, x, 2));
}
#endif  // __CUDA_ARCH__

}  // namespace autoflash

namespace autoflash {

constexpr int kHeadDim = 64, kHeadDimV = 64;
constexpr int kColumns = 64, kColumnsV = 64;  // as stored, zero beyond the head dim
constexpr int kBlockM = 128, kBlockN = 64, kStages = 1;
constexpr int kSmemBytes = 32768;
constexpr int kPack = 1;   // query heads in a tile
constexpr int kShare = 1;  // tiles of neighbouring heads that read the same keys
constexpr bool kCausal = false, kLocal = true, kSoftcap = false;
constexpr bool kQInRegisters = false, kSplitLoop = false;
constexpr int64_t kKeysInL2 = 0;  // heads one after the other

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// A score may exceed its row's reference by 2^kSlack before the reference moves and outputs are
// rescaled, which is then rare; float32 sums have room for it, and so has float16 for weights.
constexpr float kSlack = 8.0f;

// The arguments of a call, under the names of the op, and what follows from them.
struct Arguments {
  const Element *q, *k, *v;
  Element* out;
  float* lse;
  int seqlen_q, seqlen_k, num_heads, window_left, window_right;
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  int64_t k_stride_batch, k_stride_seq, k_stride_head;
  int64_t v_stride_batch, v_stride_seq, v_stride_head;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  float scale;        // of scores, to base 2; positive
  float cap_scale;    // of scores, before tanh; positive
  int tiles_m, heads, section;  // tiles of a head; heads of all batches; heads that take turns
};

#ifdef __CUDA_ARCH__
using TileQ = TileLayout<kBlockM, kColumns>;
using TileK = TileLayout<kBlockN, kColumns>;
using TileV = TileLayout<kBlockN, kColumnsV>;
using TileO = TileLayout<kBlockM, kColumnsV>;
constexpr int kRowGroups = kBlockM / (16 * kWarps);

// Places in shared memory, in elements. Queries in registers leave theirs to V; O replaces all.
constexpr int kAlign = 512;
constexpr int kPlaceV = round_up(kStages * TileK::kElements, kAlign);
constexpr int kEndV = kPlaceV + round_up(kStages * TileV::kElements, kAlign);
constexpr int kPlaceQ = kQInRegisters ? kPlaceV : kEndV;
constexpr int kEnd = cute::max(kEndV, kPlaceQ + round_up(TileQ::kElements, kAlign));
static_assert(kSmemBytes == cute::max(kEnd, TileO::kElements) * int(sizeof(Element)),
              "the declaration counts as the kernel does");

// ---- Work ----------------------------------------------------------------------------------

// Which rows of which head a thread block takes, and which keys they see.
struct Work {
  int batch, head, kv_head;    // head: the first one, where the group is packed
  int first_row;
  int begin, end;              // tiles of keys that some row sees some of
  int full_begin, full_end;    // tiles that all rows see all of

  CUTE_DEVICE explicit Work(const Arguments& args) {
    int tile = blockIdx.x, m, all_heads;
    if constexpr (kKeysInL2 != 0) {
      // The heads whose keys fit into L2 together take turns, their longest tiles first.
      int first = tile / (args.section * args.tiles_m) * args.section;
      int size = cute::min(args.section, args.heads - first);
      int within = tile - first * args.tiles_m;
      m = within / size;
      all_heads = first + within % size;
    } else {
      m = tile % args.tiles_m;
      all_heads = tile / args.tiles_m;
    }
    // Longest first, so that the last thread blocks to end are short.
    if constexpr (kCausal || kLocal) m = args.tiles_m - 1 - m;
    int heads = args.num_heads / kPack;
    batch = all_heads / heads;
    int share = all_heads % heads;
    head = share * kPack;
    kv_head = share / kShare;
    first_row = m * kBlockM;

    int offset = args.seqlen_k - args.seqlen_q;
    int lowest = first_row / kPack;
    int highest = cute::min((first_row + kBlockM - 1) / kPack, args.seqlen_q - 1);
    int left = 0, full_left = 0, right = args.seqlen_k, full_right = args.seqlen_k;
    if constexpr (kCausal || kLocal) {
      int ahead = offset + 1 + (kLocal ? args.window_right : 0);
      right = cute::max(0, cute::min(right, highest + ahead));
      full_right = cute::max(0, cute::min(right, lowest + ahead));
    }
    if constexpr (kLocal) {
      left = cute::min(cute::max(0, lowest + offset - args.window_left), right);
      full_left = cute::max(0, highest + offset - args.window_left);
    }
    begin = left / kBlockN;
    end = right > left ? (right + kBlockN - 1) / kBlockN : begin;
    full_end = cute::max(begin, cute::min(end, full_right / kBlockN));
    full_begin = cute::min(full_end, cute::max(begin, (full_left + kBlockN - 1) / kBlockN));
  }
};

// The address of a row, whose number counts heads too where the group is packed.
CUTE_DEVICE int64_t row_offset(int row, int64_t stride_seq, int64_t stride_head) {
  if constexpr (kPack == 1) {
    return row * stride_seq;
  } else {
    return row / kPack * stride_seq + row % kPack * stride_head;
  }
}

// Walks over the chunks of Q or O that are this thread's and inside the tensor.
template <class Tile, int kUsed, class F>
CUTE_DEVICE void for_each_chunk_of_rows(int first_row, int rows, F f) {
  Tile::for_each_chunk([&](int row, int more, int col, int place) {
    row += more + first_row;
    f(row, col, place, row < rows && col < kUsed);
  });
}

// ---- Softmax -------------------------------------------------------------------------------

// Views an accumulator ((2, 2), row groups, column groups) as (rows, columns) of this thread.
template <class Accumulator>
CUTE_DEVICE auto by_rows(Accumulator&& acc) {
  auto l = acc.layout();
  return make_tensor(acc.data(),
                     make_layout(make_layout(get<0, 1>(l), get<1>(l)),
                                 make_layout(get<0, 0>(l), get<2>(l))));
}

constexpr int kRows = 2 * kRowGroups;  // of a thread

// The row of the tile that a thread's row is: 8 apart in a group, groups 16 * kWarps apart.
CUTE_DEVICE int row_of(int r) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return r / 2 * 16 * kWarps + warp * 16 + r % 2 * 8 + lane / 4;
}

struct Softmax {
  float reference[kRows];  // about the largest score of each row so far, to base 2
  float sum[kRows];        // of 2^(score - reference) over this thread's columns

  CUTE_DEVICE Softmax() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      reference[r] = -INFINITY;
      sum[r] = 0.0f;
    }
  }

  // Moves the references up where a score is far above, and rescales what has been accumulated.
  template <class Scores, class Out>
  CUTE_DEVICE void update(const Scores& scores, float scale, Out& out) {
    float top[kRows];
    bool above = false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      top[r] = scores(r, 0);
      CUTE_UNROLL
      for (int c = 1; c < size<1>(scores); ++c) top[r] = fmaxf(top[r], scores(r, c));
      top[r] *= scale;
      above |= top[r] > reference[r] + kSlack;
    }
    if (!__any_sync(~0u, above)) return;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float highest = fmaxf(reference[r], reduce_row(top[r], [](float a, float b) { return fmaxf(a, b); }));
      // A row that has seen no key yet: its sum and output are 0, whatever the factor.
      float factor = highest == -INFINITY ? 1.0f : fast_exp2(reference[r] - highest);
      reference[r] = highest;
      sum[r] *= factor;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(out); ++c) out(r, c) *= factor;
    }
  }

  // What is subtracted from scores; of a row that has seen no key yet, anything finite.
  CUTE_DEVICE float shift(int r) const { return reference[r] == -INFINITY ? 0.0f : reference[r]; }
};

// Scores beyond what their row sees become -inf. `first_key` is that of the tile.
template <class Scores>
CUTE_DEVICE void hide(Scores& scores, const Arguments& args, int first_row, int first_key) {
  int offset = args.seqlen_k - args.seqlen_q;
  int first_column = first_key + threadIdx.x % 4 * 2;
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int position = (first_row + row_of(r)) / kPack + offset;
    int last = args.seqlen_k - 1;
    if constexpr (kCausal) last = cute::min(last, position);
    if constexpr (kLocal) last = cute::min(last, position + args.window_right);
    last -= first_column;
    [[maybe_unused]] int first = position - args.window_left - first_column;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(scores); ++c) {
      int key = c / 2 * 8 + c % 2;
      bool hidden = key > last;
      if constexpr (kLocal) hidden |= key < first;
      if (hidden) scores(r, c) = -INFINITY;
    }
  }
}

#endif  // __CUDA_ARCH__

// ---- Kernel --------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) fwd_kernel(const __grid_constant__ Arguments args) {
#ifdef __CUDA_ARCH__
  extern __shared__ __align__(1024) Element smem[];
  const Work work(args);
  const int rows = args.seqlen_q * kPack;
  Element* smem_q = smem + kPlaceQ;

  // What each thread loads ---------------------------------------------------------------------
  auto load_queries = [&] {
    const Element* q = args.q + work.batch * args.q_stride_batch + work.head * args.q_stride_head;
    for_each_chunk_of_rows<TileQ, kHeadDim>(
        work.first_row, rows, [&](int row, int col, int place, bool inside) {
          load_chunk<false>(q + row_offset(row, args.q_stride_seq, args.q_stride_head) + col,
                            smem_q + place, inside);
        });
  };
  const Element* k = args.k + work.batch * args.k_stride_batch + work.kv_head * args.k_stride_head;
  const Element* v = args.v + work.batch * args.v_stride_batch + work.kv_head * args.v_stride_head;
  auto load_keys = [&](int tile, int stage) {
    int first = tile * kBlockN;
    load_rows<kBlockN, kColumns, kHeadDim>(k + first * args.k_stride_seq, args.k_stride_seq,
                                           args.seqlen_k - first, smem + stage * TileK::kElements);
  };
  auto load_values = [&](int tile, int stage) {
    int first = tile * kBlockN;
    load_rows<kBlockN, kColumnsV, kHeadDimV>(v + first * args.v_stride_seq, args.v_stride_seq,
                                             args.seqlen_k - first,
                                             smem + kPlaceV + stage * TileV::kElements);
  };

  // What each thread multiplies ----------------------------------------------------------------
  Mma mma;
  auto thread = mma.get_thread_slice(threadIdx.x);
  auto tile_q = make_tensor(make_smem_ptr(smem_q), typename TileQ::Type{});
  auto tile_k = [&](int stage) {
    return make_tensor(make_smem_ptr(smem + stage * TileK::kElements), typename TileK::Type{});
  };
  auto tile_vt = [&](int stage) {  // (head_dim_v, keys): the second operand of PV
    return make_tensor(make_smem_ptr(smem + kPlaceV + stage * TileV::kElements),
                       composition(typename TileV::Type{},
                                   Layout<Shape<Int<kColumnsV>, Int<kBlockN>>, Stride<Int<kBlockN>, _1>>{}));
  };
  auto copy_q = make_tiled_copy_A(LoadMatrix{}, mma);
  auto copy_k = make_tiled_copy_B(LoadMatrix{}, mma);
  auto copy_v = make_tiled_copy_B(LoadMatrixTransposed{}, mma);
  auto thread_q = copy_q.get_thread_slice(threadIdx.x);
  auto thread_k = copy_k.get_thread_slice(threadIdx.x);
  auto thread_v = copy_v.get_thread_slice(threadIdx.x);

  auto q_fragment = thread.partition_fragment_A(tile_q);  // (values, row groups, steps of 16)
  auto q_shared = thread_q.partition_S(tile_q);
  auto q_target = thread_q.retile_D(q_fragment);
  auto out = partition_fragment_C(mma, Shape<Int<kBlockM>, Int<kColumnsV>>{});
  clear(out);
  auto out_rows = by_rows(out);
  Softmax softmax;

  // S = Q K^T
  auto multiply_keys = [&](auto& scores, int stage) {
    auto k_tile = tile_k(stage);
    auto k_fragment = thread.partition_fragment_B(k_tile);
    auto k_shared = thread_k.partition_S(k_tile);
    auto k_target = thread_k.retile_D(k_fragment);
    constexpr int kSteps = kColumns / 16;
    clear(scores);
    if constexpr (!kQInRegisters) copy(copy_q, q_shared(_, _, _0{}), q_target(_, _, _0{}));
    copy(copy_k, k_shared(_, _, _0{}), k_target(_, _, _0{}));
    for_each(make_seq<kSteps>{}, [&](auto step) {
      constexpr int next = decltype(step)::value + 1;
      if constexpr (next < kSteps) {
        if constexpr (!kQInRegisters) copy(copy_q, q_shared(_, _, Int<next>{}), q_target(_, _, Int<next>{}));
        copy(copy_k, k_shared(_, _, Int<next>{}), k_target(_, _, Int<next>{}));
      }
      gemm(mma, q_fragment(_, _, step), k_fragment(_, _, step), scores);
    });
  };

  // P = 2^(S - reference), O += P V; 16 keys at a time, so that exponentials of some run beside
  // products of others.
  auto multiply_values = [&](auto& scores, float scale, int stage) {
    auto v_tile = tile_vt(stage);
    auto v_fragment = thread.partition_fragment_B(v_tile);
    auto v_shared = thread_v.partition_S(v_tile);
    auto v_target = thread_v.retile_D(v_fragment);
    auto p_fragment = make_tensor<Element>(Shape<Shape<_2, _2, _2>, Int<kRowGroups>>{});
    auto p_words = recast<uint32_t>(p_fragment);  // ((1, row half, key half), row group)
    float shift[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) shift[r] = softmax.shift(r);
    for_each(make_seq<kBlockN / 16>{}, [&](auto step) {
      copy(copy_v, v_shared(_, _, step), v_target(_, _, step));
      CUTE_UNROLL
      for (int group = 0; group < kRowGroups; ++group) {
        CUTE_UNROLL
        for (int half = 0; half < 4; ++half) {  // rows 0 and 8, then those of the next 8 keys
          int r = 2 * group + half % 2, column = 2 * step + half / 2;
          float first = fast_exp2(fmaf(scores(make_coord(0, half % 2), group, column), scale, -shift[r]));
          float second = fast_exp2(fmaf(scores(make_coord(1, half % 2), group, column), scale, -shift[r]));
          softmax.sum[r] += first + second;
          p_words(make_coord(0, half % 2, half / 2), group) = pack(first, second);
        }
      }
      gemm(mma, p_fragment, v_fragment(_, _, step), out);
    });
  };

  // Prologue -----------------------------------------------------------------------------------
  const int tiles = work.end - work.begin;
  if (tiles > 0) {
    load_queries();
    load_keys(work.end - 1, 0);
    if constexpr (!kQInRegisters && kStages > 1) load_values(work.end - 1, 0);
    cp_async_fence();
    if constexpr (kQInRegisters) {
      cp_async_wait<0>();
      __syncthreads();
      copy(copy_q, q_shared, q_target);
      __syncthreads();  // V may come
      if constexpr (kStages > 1) {
        load_values(work.end - 1, 0);
        cp_async_fence();
      }
    }
    CUTE_UNROLL
    for (int ahead = 1; ahead < kStages - 1; ++ahead) {
      if (ahead < tiles) {
        load_keys(work.end - 1 - ahead, ahead);
        load_values(work.end - 1 - ahead, ahead);
      }
      cp_async_fence();
    }

    // Main loop --------------------------------------------------------------------------------
    int stage = 0;
    const float scale = args.scale;
    auto visit = [&](int tile, auto masked) {
      auto scores = partition_fragment_C(mma, Shape<Int<kBlockM>, Int<kBlockN>>{});
      auto score_rows = by_rows(scores);
      cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
      __syncthreads();  // this tile is there, and the warps have done with the one before
      if constexpr (kStages == 1) {
        load_values(tile, 0);
      } else {
        int next = tile - (kStages - 1);
        int free = stage == 0 ? kStages - 1 : stage - 1;
        if (next >= work.begin) {
          load_keys(next, free);
          load_values(next, free);
        }
      }
      cp_async_fence();

      multiply_keys(scores, stage);
      if constexpr (kSoftcap) {
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) scores(i) = fast_tanh(scores(i) * args.cap_scale);
      }
      if (masked) hide(score_rows, args, work.first_row, tile * kBlockN);
      softmax.update(score_rows, scale, out_rows);

      if constexpr (kStages == 1) {
        cp_async_wait<0>();
        __syncthreads();  // V is there, and the warps have done with K
        if (tile > work.begin) load_keys(tile - 1, 0);
        cp_async_fence();
      }
      multiply_values(scores, scale, stage);
      if constexpr (kStages > 1) stage = stage == kStages - 1 ? 0 : stage + 1;
    };
    if constexpr (kSplitLoop) {
      int tile = work.end - 1;
      CUTE_NO_UNROLL
      for (; tile >= work.full_end; --tile) visit(tile, true_type{});
      CUTE_NO_UNROLL
      for (; tile >= work.full_begin; --tile) visit(tile, false_type{});
      if constexpr (kLocal) {
        CUTE_NO_UNROLL
        for (; tile >= work.begin; --tile) visit(tile, true_type{});
      }
    } else {
      CUTE_NO_UNROLL
      for (int tile = work.end - 1; tile >= work.begin; --tile) {
        visit(tile, tile >= work.full_end || (kLocal && tile < work.full_begin));
      }
    }
    cp_async_wait<0>();
  }

  // Epilogue -----------------------------------------------------------------------------------
  const int64_t lse_of_head = (int64_t(work.batch) * args.num_heads + work.head) * args.seqlen_q;
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float sum = reduce_row(softmax.sum[r], [](float a, float b) { return a + b; });
    float inverse = sum == 0.0f ? 1.0f : 1.0f / sum;  // a row that saw no key is 0 already
    CUTE_UNROLL
    for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= inverse;
    int row = work.first_row + row_of(r);
    if (args.lse != nullptr && threadIdx.x % 4 == 0 && row < rows) {
      args.lse[lse_of_head + row % kPack * int64_t(args.seqlen_q) + row / kPack] =
          sum == 0.0f ? -INFINITY : softmax.reference[r] * kLn2 + logf(sum);
    }
  }
  __syncthreads();  // the warps have done with K and V, whose place O takes
  auto tile_o = make_tensor(make_smem_ptr(smem), typename TileO::Type{});
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int row = row_of(r), column = threadIdx.x % 4 * 2;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(out_rows); c += 2) {
      *reinterpret_cast<uint32_t*>(&tile_o(row, column + c * 4)) = pack(out_rows(r, c), out_rows(r, c + 1));
    }
  }
  __syncthreads();
  Element* to = args.out + work.batch * args.out_stride_batch + work.head * args.out_stride_head;
  for_each_chunk_of_rows<TileO, kHeadDimV>(
      work.first_row, rows, [&](int row, int col, int place, bool inside) {
        if (!inside) return;
        Element* at = to + row_offset(row, args.out_stride_seq, args.out_stride_head) + col;
        if constexpr (kAligned) {
          *reinterpret_cast<uint128_t*>(at) = *reinterpret_cast<const uint128_t*>(smem + place);
        } else {
          CUTE_UNROLL
          for (int e = 0; e < 8; ++e) at[e] = smem[place + e];
        }
      });
#endif
}

}  // namespace autoflash

extern "C" int launch(const void* q, const void* k, const void* v, void* out, float* lse, void* workspace, int32_t batch, int32_t seqlen_q, int32_t seqlen_k, int32_t num_heads, int32_t num_kv_heads, int32_t window_left, int32_t window_right, int64_t q_stride_batch, int64_t q_stride_seq, int64_t q_stride_head, int64_t k_stride_batch, int64_t k_stride_seq, int64_t k_stride_head, int64_t v_stride_batch, int64_t v_stride_seq, int64_t v_stride_head, int64_t out_stride_batch, int64_t out_stride_seq, int64_t out_stride_head, float softcap, float softmax_scale, void* stream) {

  using namespace autoflash;
  Arguments args{};
  args.q = static_cast<const Element*>(q);
  args.k = static_cast<const Element*>(k);
  args.v = static_cast<const Element*>(v);
  args.out = static_cast<Element*>(out);
  args.lse = lse;
  args.seqlen_q = seqlen_q;
  args.seqlen_k = seqlen_k;
  args.num_heads = num_heads;
  args.window_left = window_left;
  args.window_right = window_right;
  args.q_stride_batch = q_stride_batch, args.q_stride_seq = q_stride_seq, args.q_stride_head = q_stride_head;
  args.k_stride_batch = k_stride_batch, args.k_stride_seq = k_stride_seq, args.k_stride_head = k_stride_head;
  args.v_stride_batch = v_stride_batch, args.v_stride_seq = v_stride_seq, args.v_stride_head = v_stride_head;
  args.out_stride_batch = out_stride_batch, args.out_stride_seq = out_stride_seq, args.out_stride_head = out_stride_head;
  args.scale = (kSoftcap ? softcap : softmax_scale) * kLog2E;
  args.cap_scale = kSoftcap ? softmax_scale / softcap : 0.0f;
  args.tiles_m = int((int64_t(seqlen_q) * kPack + kBlockM - 1) / kBlockM);
  args.heads = batch * (num_heads / kPack);
  int64_t tiles = int64_t(args.tiles_m) * args.heads;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  int64_t section = cute::max<int64_t>(kKeysInL2 / cute::max(seqlen_k, 1), 1) * kShare;
  args.section = int(cute::min<int64_t>(section, args.heads));

  constexpr int kDevices = 64;
  static bool configured[kDevices];  // doing it twice does no harm
  int device;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kDevices) return cudaErrorInvalidDevice;
  if (!configured[device]) {
    cudaError_t error = cudaFuncSetAttribute(fwd_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
    if (error) return error;
    configured[device] = true;
  }
  if (tiles == 0) return 0;
  void* arguments[] = {&args};
  return cudaLaunchKernel(reinterpret_cast<const void*>(fwd_kernel), dim3(int(tiles)), dim3(kThreads), arguments,
                          kSmemBytes, static_cast<cudaStream_t>(stream));
}
