// Attention forward on a CPU.
//
// Query rows lie side by side in vector lanes, so that every statistic of the online softmax is a
// vector and no step reduces across lanes. A key or value element is one word broadcast to all
// lanes: K streams through in its own layout, at 2 bytes per cycle.
//
//   row      a (query position, query head) pair; those that share a kv head are numbered together
//   panel    kPanel rows, one per lane of kVectors vectors
//   block    kPanels panels: the work a thread takes at a time
//   tile     kBlockN keys: one step of the online softmax
//   word     32 bits: a float, or a pair of bfloat16
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <utility>

// ---- Vector lanes --------------------------------------------------------------------------
// A word is 32 bits: one float, or two neighbouring bfloat16 that one instruction multiplies.

#include <immintrin.h>

namespace {

constexpr int kLanes = 8;           // 32-bit words of a vector register: avx2
constexpr bool kPairs = false;       // words are bfloat16 pairs
constexpr int kPerWord = kPairs ? 2 : 1;


using Word = int32_t;
using Vec = float __attribute__((vector_size(4 * kLanes)));
using IntVec = int32_t __attribute__((vector_size(4 * kLanes)));

constexpr float kInfinity = __builtin_inff();

// Calls f(0) ... f(N - 1) with constants. The compiler keeps an array of vectors in registers only
// if every index is a constant before its first optimisation pass, which `#pragma unroll` is not.
template <class F, int... I>
inline __attribute__((always_inline)) void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
inline __attribute__((always_inline)) void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

inline Vec load(const void* from) { return *static_cast<const Vec*>(from); }
inline void store(void* to, Vec value) { *static_cast<Vec*>(to) = value; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec splat_word(Word x) { return (Vec)(x | IntVec{}); }
inline IntVec splat_int(int x) { return x | IntVec{}; }


inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline bool any_greater(Vec a, Vec b) {
  IntVec greater = a > b;
  int any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= greater[lane];
  return any != 0;
}

// Adding 1.5 * 2^23 leaves an integer in the low bits of the mantissa; subtracting a half first
// makes the rounding a floor (up to a tie, for which the polynomial holds too).
constexpr float kRound = 12582912.0f;
inline Vec fraction(Vec x) { return x - (((x - 0.5f) + kRound) - kRound); }
inline Vec scale_by_exp2(Vec y, Vec x) {
  IntVec exponent = (IntVec)((x - 0.5f) + kRound) << 23;
  Vec scaled = (Vec)((IntVec)y + exponent);
  return x < -126.0f ? Vec{} : scaled;
}


// acc += a * b, over both halves of a word where words are pairs.
inline Vec multiply_add(Vec a, Vec b, Vec acc) {
  return acc + a * b;

}

// 2^x for x from -infinity to 127: a minimax polynomial of 2^f on [0, 1), then the exponent.
// The relative error is 1.5e-7, or 2.7e-6 where `Rough`: still below the spacing of bfloat16 by a
// factor of a thousand, so that sums, and with them lse, stay good to about 1e-5.
template <bool Rough>
inline Vec exp2(Vec x) {
  Vec f = fraction(x);
  Vec y;
  if constexpr (Rough) {
    y = splat(0.01353416791f);
    y = y * f + 0.05201146062f;
    y = y * f + 0.24144275689f;
    y = y * f + 0.69300383447f;
    y = y * f + 1.00000259337f;
  } else {
    y = splat(0.00187757667f);
    y = y * f + 0.00898934009f;
    y = y * f + 0.05582631805f;
    y = y * f + 0.24015361704f;
    y = y * f + 0.69315307320f;
    y = y * f + 0.99999992506f;
  }
  return scale_by_exp2(y, x);
}


// tanh within 3e-7, relatively near 0 too: a polynomial there, else by exp2.
inline Vec tanh(Vec x) {
  Vec size = (Vec)((IntVec)x & 0x7fffffff);
  Vec y = x * x;
  Vec near = splat(-5.895156e-3f);
  near = near * y + 0.02079597f;
  near = near * y - 0.05378383f;
  near = near * y + 0.13331924f;
  near = near * y - 0.333333f;
  near = near * y * x + x;
  Vec t = exp2</*Rough=*/false>(size * -2.885390082f);
  Vec far = 1.0f - 2.0f * t / (1.0f + t);
  return size < 0.6f ? near : x < 0.0f ? -far : far;
}


// Lane i of the result is lane From[i] of a followed by b.
template <int... From>
inline __attribute__((always_inline)) Vec shuffle(Vec a, Vec b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, From...);
#else
  return __builtin_shuffle(a, b, IntVec{From...});
#endif
}

// One step of a transposition: exchanges the off-diagonal quarters of a and b, of `Step` lanes.
template <int Step, int... Lane>
inline __attribute__((always_inline)) void exchange(Vec& a, Vec& b,
                                                    std::integer_sequence<int, Lane...>) {
  Vec upper = shuffle<(Lane & Step ? kLanes + Lane - Step : Lane)...>(a, b);
  b = shuffle<(Lane & Step ? kLanes + Lane : Lane + Step)...>(a, b);
  a = upper;
}

// Transposes kLanes vectors in registers.
inline __attribute__((always_inline)) void transpose(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  unrolled<kLanes == 4 ? 2 : kLanes == 8 ? 3 : 4>([&](auto stage) {
    unrolled<kLanes>([&](auto row) {
      constexpr int step = 1 << decltype(stage)::value;
      if constexpr ((row & step) == 0) exchange<step>(rows[row], rows[row + step], lanes);
    });
  });
}

}  // namespace

// ---- Elements of the caller's tensors ------------------------------------------------------

namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

using Element = float;
inline float to_float(Element x) { return x; }
inline Element from_float(float x) { return x; }


// The words of a row of `n` elements.
inline void row_to_words(const Element* row, int n, Word* words) {
  if constexpr (kPairs) {
    words[(n - 1) / 2] = 0;  // the last pair may be half a pair
    std::memcpy(words, row, n * sizeof(Element));
  } else {
    for (int c = 0; c < n; ++c) {
      float value = to_float(row[c]);
      std::memcpy(&words[c], &value, 4);
    }
  }
}

// The words that pair two rows of `n` elements of 16 bits.
inline void rows_to_words(const Element* low, const Element* high, int n, Word* words) {
  const auto* low_bits = reinterpret_cast<const uint16_t*>(low);
  const auto* high_bits = reinterpret_cast<const uint16_t*>(high);
  for (int c = 0; c < n; ++c) words[c] = Word(low_bits[c] | uint32_t(high_bits[c]) << 16);
}

}  // namespace

namespace {

constexpr int kHeadDim = 64;
constexpr int kHeadDimV = 64;
constexpr int kGroupSize = 1;         // query heads that share a kv head

constexpr int kVectors = 3;
constexpr int kPanels = 1;
constexpr int kBlockN = 192;
constexpr int kKeyRows = 4;           // register tile of scores: kKeyRows x kVectors
constexpr int kValueColumns = 4;      // of outputs: kValueColumns x kVectors
constexpr bool kPrepack = true;
constexpr bool kLongestFirst = false;

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

constexpr int kPanel = kVectors * kLanes;
constexpr int kHeadWords = (kHeadDim + kPerWord - 1) / kPerWord;
constexpr int kColumns = round_up(kHeadDimV, kValueColumns);
constexpr int kKeyTileWords = kBlockN * kHeadWords;
constexpr int kValueTileWords = kBlockN / kPerWord * kColumns;
// The last register tile of a row is transposed whole.
constexpr int kQueryWords = round_up(kHeadWords, kLanes);
constexpr int kOutRows = round_up(kColumns, kLanes);

// A score may exceed the reference that it is measured against by 2^kSlack before the reference
// moves and outputs are rescaled; float32 sums have room for it.
constexpr float kSlack = 8.0f;

// Most memory for packed K and V; heads that need more are done in turns. The C library keeps what
// is freed for the next call up to 32 MiB; beyond, every call would pay for fresh pages.
constexpr int64_t kScratchBytes = int64_t(24) << 20;

static_assert(kBlockN % kKeyRows == 0 && kKeyRows % kPerWord == 0);

// The arguments of a call, under the names of the op.
struct Call {
  const Element *q, *k, *v;
  Element* out;
  float* lse;
  int64_t batch, seqlen_q, seqlen_k, num_heads, num_kv_heads;
  int64_t q_stride_batch, q_stride_seq, q_stride_head;
  int64_t k_stride_batch, k_stride_seq, k_stride_head;
  int64_t v_stride_batch, v_stride_seq, v_stride_head;
  int64_t out_stride_batch, out_stride_seq, out_stride_head;
  float scale;          // of the scores, times log2(e); positive
  Word query_keep, query_flip;  // the rest of a scale that is negative or zero: see launch()
  float into_cap;       // factor of the scores before tanh
  int64_t window_left, window_right;

  // The tile of the first key that some row sees.
  int64_t first_tile() const {
    return std::max<int64_t>(seqlen_k - seqlen_q - window_left, 0) / kBlockN;
  }

  int64_t rows() const { return seqlen_q * kGroupSize; }  // of one kv head
};

// What the walk over the keys carries along for kPanel rows.
struct Panel {
  alignas(64) Word queries[kQueryWords][kPanel];  // transposed
  alignas(64) float out[kOutRows][kPanel];        // transposed, not yet divided by sum
  alignas(64) float reference[kPanel];            // about the largest scaled score so far
  alignas(64) float sum[kPanel];                  // of exp2(score - reference)
  alignas(64) int32_t last_key[kPanel];           // the last key that each row sees
  int64_t first_row;
  int rows;
  int64_t keys;       // keys that some row sees: 0 .. keys - 1
  int64_t full_keys;  // keys that every row sees
  alignas(64) int32_t first_key[kPanel];  // the first key that each row sees
  int64_t begin;       // of the keys above, those before this one no row sees
  int64_t full_begin;  // and those before this one not every row
};

struct Workspace {
  alignas(64) Panel panels[kPanels];
  alignas(64) Word scores[kBlockN][kPanel];  // of one tile and panel; then the probabilities
  alignas(64) Word rows[kLanes][kQueryWords > kOutRows ? kQueryWords : kOutRows];
  alignas(64) Word keys[kPrepack ? 1 : kKeyTileWords];
  alignas(64) Word values[kPrepack ? 1 : kValueTileWords];
};

// ---- Packing -------------------------------------------------------------------------------

// K of one tile as [key][word]; keys past the end are zero, up to a whole register tile.
void pack_keys(const Call& call, const Element* k, int64_t first, Word* packed) {
  int count = int(std::min<int64_t>(kBlockN, call.seqlen_k - first));
  for (int j = 0; j < count; ++j) {
    row_to_words(k + (first + j) * call.k_stride_seq, kHeadDim, packed + j * kHeadWords);
  }
  int whole = round_up(count, kKeyRows);
  std::memset(packed + count * kHeadWords, 0, sizeof(Word) * (whole - count) * kHeadWords);
}

// V of one tile as [column / kValueColumns][key / kPerWord][column % kValueColumns], so that the
// product with the probabilities reads it front to back.
void pack_values(const Call& call, const Element* v, int64_t first, Word* packed) {
  static const Element zeros[kHeadDimV] = {};
  int count = int(std::min<int64_t>(kBlockN, call.seqlen_k - first));
  int whole = round_up(count, kKeyRows);
  Word words[kColumns] = {};
  for (int j = 0; j < whole; j += kPerWord) {
    const Element* row = v + (first + j) * call.v_stride_seq;
    if constexpr (kPairs) {
      rows_to_words(j < count ? row : zeros, j + 1 < count ? row + call.v_stride_seq : zeros,
                    kHeadDimV, words);
    } else {
      row_to_words(j < count ? row : zeros, kHeadDimV, words);
    }
    Word* to = packed + j / kPerWord * kValueColumns;
    for (int c = 0; c < kColumns; c += kValueColumns) {
      std::memcpy(to, words + c, sizeof(Word) * kValueColumns);
      to += kBlockN / kPerWord * kValueColumns;
    }
  }
}

// ---- The phases of one panel ---------------------------------------------------------------

void start_panel(const Call& call, int64_t b, int64_t kv_head, int64_t first_row, Workspace& work,
                 Panel& panel) {
  panel.first_row = first_row;
  panel.rows = int(std::min<int64_t>(kPanel, call.rows() - first_row));
  auto last_key = [&](int lane) {
    int64_t position = (first_row + std::min(lane, panel.rows - 1)) / kGroupSize;
    int64_t last = call.seqlen_k - 1;
    last = std::min(last, position + call.seqlen_k - call.seqlen_q + call.window_right);
    return std::max<int64_t>(last, -1);
  };
  for (int lane = 0; lane < kPanel; ++lane) panel.last_key[lane] = int32_t(last_key(lane));
  panel.full_keys = last_key(0) + 1;
  panel.keys = last_key(kPanel - 1) + 1;
  auto first_key = [&](int lane) {
    int64_t position = (first_row + std::min(lane, panel.rows - 1)) / kGroupSize;
    return std::max<int64_t>(position + call.seqlen_k - call.seqlen_q - call.window_left, 0);
  };
  for (int lane = 0; lane < kPanel; ++lane) panel.first_key[lane] = int32_t(first_key(lane));
  panel.begin = first_key(0);
  panel.full_begin = first_key(kPanel - 1);
  for (int v = 0; v < kVectors; ++v) {
    store(&panel.reference[v * kLanes], splat(-kInfinity));
    store(&panel.sum[v * kLanes], Vec{});
  }
  std::memset(panel.out, 0, sizeof(panel.out));

  // Q, a square of kLanes rows and words at a time.
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) {
      Word* words = work.rows[lane];
      int64_t row = v * kLanes + lane;
      if (row >= panel.rows) {
        std::memset(words, 0, sizeof(Word) * kQueryWords);
        continue;
      }
      row += first_row;
      int64_t head = kv_head * kGroupSize + row % kGroupSize;
      row_to_words(call.q + b * call.q_stride_batch + row / kGroupSize * call.q_stride_seq +
                       head * call.q_stride_head,
                   kHeadDim, words);
      for (int w = 0; w < kHeadWords; ++w) {
        words[w] = (words[w] & call.query_keep) ^ call.query_flip;
      }
    }
    for (int w = 0; w < kQueryWords; w += kLanes) {
      Vec square[kLanes];
      unrolled<kLanes>([&](auto lane) { square[lane] = load(&work.rows[lane][w]); });
      transpose(square);
      unrolled<kLanes>([&](auto i) { store(&panel.queries[w + i][v * kLanes], square[i]); });
    }
  }
}

// S = tanh(into_cap * K Q^T) for `count` keys of a tile; returns the largest score of each row.
void compute_scores(const Panel& panel, const Word* keys, int count, int64_t first_key,
                    float into_cap, Word (*scores)[kPanel], Vec (&largest)[kVectors]) {
  bool masked = first_key < panel.full_begin || first_key + count > panel.full_keys;
  Vec top[kVectors];
  unrolled<kVectors>([&](auto v) { top[v] = splat(-kInfinity); });
  for (int j = 0; j < count; j += kKeyRows) {
    Vec acc[kKeyRows * kVectors];
    unrolled<kKeyRows * kVectors>([&](auto i) { acc[i] = Vec{}; });
    const Word* key = keys + j * kHeadWords;
#pragma GCC unroll 2
    for (int w = 0; w < kHeadWords; ++w) {
      Vec query[kVectors];
      unrolled<kVectors>([&](auto v) { query[v] = load(&panel.queries[w][v * kLanes]); });
      unrolled<kKeyRows>([&](auto r) {
        Vec word = splat_word(key[r * kHeadWords + w]);
        unrolled<kVectors>([&](auto v) {
          acc[r * kVectors + v] = multiply_add(query[v], word, acc[r * kVectors + v]);
        });
      });
    }
    unrolled<kKeyRows * kVectors>([&](auto i) { acc[i] = tanh(acc[i] * into_cap); });
    if (masked) {
      unrolled<kVectors>([&](auto v) {
        IntVec last = (IntVec)load(&panel.last_key[v * kLanes]);
        IntVec first = (IntVec)load(&panel.first_key[v * kLanes]);
        unrolled<kKeyRows>([&](auto r) {
          Vec& score = acc[r * kVectors + v];
          IntVec at = splat_int(int(first_key) + j + r);
          score = (last >= at) & (first <= at) ? score : splat(-kInfinity);
        });
      });
    }
    unrolled<kKeyRows>([&](auto r) {
      unrolled<kVectors>([&](auto v) {
        store(&scores[j + r][v * kLanes], acc[r * kVectors + v]);
        top[v] = max(top[v], acc[r * kVectors + v]);
      });
    });
  }
  unrolled<kVectors>([&](auto v) { largest[v] = top[v]; });
}

// Moves the references up where a score is far above them. Returns whether any moved; then what
// has been accumulated must be multiplied by `alpha`.
bool update_reference(Panel& panel, float scale, const Vec (&largest)[kVectors],
                      Vec (&alpha)[kVectors]) {
  bool moves = false;
  unrolled<kVectors>([&](auto v) {
    moves |= any_greater(largest[v] * scale, load(&panel.reference[v * kLanes]) + kSlack);
  });
  if (!moves) return false;
  unrolled<kVectors>([&](auto v) {
    Vec before = load(&panel.reference[v * kLanes]);
    Vec after = max(before, largest[v] * scale);
    // No visible key yet: any finite value serves, as the difference is -infinity.
    Vec finite = after == -kInfinity ? Vec{} : after;
    alpha[v] = exp2</*Rough=*/false>(before - finite);  // as errors of alpha multiply
    store(&panel.reference[v * kLanes], after);
    store(&panel.sum[v * kLanes], load(&panel.sum[v * kLanes]) * alpha[v]);
  });
  return true;
}

// P = exp2(S - reference), in place and, where words are pairs, in half the space.
void compute_probabilities(Panel& panel, float scale, int count, Word (*scores)[kPanel]) {
  Vec reference[kVectors], sum[kVectors];
  unrolled<kVectors>([&](auto v) {
    Vec raw = load(&panel.reference[v * kLanes]);
    reference[v] = raw == -kInfinity ? Vec{} : raw;
    sum[v] = Vec{};
  });
#pragma GCC unroll 2
  for (int j = 0; j < count; j += kPerWord) {
    unrolled<kVectors>([&](auto v) {
      Vec p = exp2<kPairs>(load(&scores[j][v * kLanes]) * scale - reference[v]);
      sum[v] += p;
      store(&scores[j / kPerWord][v * kLanes], p);
    });
  }
  unrolled<kVectors>([&](auto v) {
    store(&panel.sum[v * kLanes], load(&panel.sum[v * kLanes]) + sum[v]);
  });
}

// O^T = alpha * O^T + V^T P for `words` words of keys.
void accumulate_output(Panel& panel, const Word* values, int words,
                       const Word (*probabilities)[kPanel], bool rescale,
                       const Vec (&alpha)[kVectors]) {
  for (int c = 0; c < kColumns; c += kValueColumns) {
    Vec acc[kValueColumns * kVectors];
    unrolled<kValueColumns>([&](auto r) {
      unrolled<kVectors>([&](auto v) {
        acc[r * kVectors + v] = load(&panel.out[c + r][v * kLanes]);
      });
    });
    if (rescale) {
      unrolled<kValueColumns>([&](auto r) {
        unrolled<kVectors>([&](auto v) { acc[r * kVectors + v] *= alpha[v]; });
      });
    }
#pragma GCC unroll 2
    for (int w = 0; w < words; ++w) {
      Vec p[kVectors];
      unrolled<kVectors>([&](auto v) { p[v] = load(&probabilities[w][v * kLanes]); });
      unrolled<kValueColumns>([&](auto r) {
        Vec word = splat_word(values[w * kValueColumns + r]);
        unrolled<kVectors>([&](auto v) {
          acc[r * kVectors + v] = multiply_add(p[v], word, acc[r * kVectors + v]);
        });
      });
    }
    values += kBlockN / kPerWord * kValueColumns;
    unrolled<kValueColumns>([&](auto r) {
      unrolled<kVectors>([&](auto v) {
        store(&panel.out[c + r][v * kLanes], acc[r * kVectors + v]);
      });
    });
  }
}

void finish_panel(const Call& call, int64_t b, int64_t kv_head, Workspace& work, Panel& panel) {
  constexpr float kLn2 = 0.69314718056f;
  for (int v = 0; v < kVectors; ++v) {
    Vec sum = load(&panel.sum[v * kLanes]);
    Vec inverse = sum == 0.0f ? Vec{} : 1.0f / sum;  // a row that sees no key is zero
    for (int c = 0; c < kOutRows; c += kLanes) {
      Vec square[kLanes];
      unrolled<kLanes>([&](auto i) {
        square[i] = load(&panel.out[c + i][v * kLanes]) * inverse;
      });
      transpose(square);
      unrolled<kLanes>([&](auto lane) { store(&work.rows[lane][c], square[lane]); });
    }
    for (int lane = 0; lane < kLanes && v * kLanes + lane < panel.rows; ++lane) {
      int64_t row = panel.first_row + v * kLanes + lane;
      int64_t position = row / kGroupSize, head = kv_head * kGroupSize + row % kGroupSize;
      Element* out = call.out + b * call.out_stride_batch + position * call.out_stride_seq +
                     head * call.out_stride_head;
      float values[kOutRows];
      std::memcpy(values, work.rows[lane], sizeof(values));
      for (int c = 0; c < kHeadDimV; ++c) out[c] = from_float(values[c]);
      if (call.lse) {
        float reference = panel.reference[v * kLanes + lane];
        float total = panel.sum[v * kLanes + lane];
        call.lse[(b * call.num_heads + head) * call.seqlen_q + position] =
            total == 0.0f ? -kInfinity : reference * kLn2 + __builtin_logf(total);
      }
    }
  }
}

// ---- The walk over the keys ----------------------------------------------------------------

// One block of rows of one kv head. `packed` holds the head's tiles, or is null if not kPrepack.
void attend(const Call& call, int64_t b, int64_t kv_head, int64_t block, const Word* packed,
            Workspace& work) {
  int64_t first_row = block * kPanel * kPanels;
  int64_t left = (call.rows() - first_row + kPanel - 1) / kPanel;
  int panels = int(std::min<int64_t>(kPanels, left));
  for (int p = 0; p < panels; ++p) {
    start_panel(call, b, kv_head, first_row + p * kPanel, work, work.panels[p]);
  }
  int64_t keys = work.panels[panels - 1].keys;
  const Element* k = call.k + b * call.k_stride_batch + kv_head * call.k_stride_head;
  const Element* v = call.v + b * call.v_stride_batch + kv_head * call.v_stride_head;
  int64_t begin = work.panels[0].begin / kBlockN * kBlockN;
  for (int64_t first_key = begin; first_key < keys; first_key += kBlockN) {
    const Word* key_tile = work.keys;
    const Word* value_tile = work.values;
    if constexpr (kPrepack) {
      int64_t tile = first_key / kBlockN - call.first_tile();
      key_tile = packed + tile * (kKeyTileWords + kValueTileWords);
      value_tile = key_tile + kKeyTileWords;
    } else {
      pack_keys(call, k, first_key, work.keys);
      pack_values(call, v, first_key, work.values);
    }
    for (int p = 0; p < panels; ++p) {
      Panel& panel = work.panels[p];
      if (panel.keys <= first_key) continue;
      if (panel.begin >= first_key + kBlockN) continue;
      int count = round_up(int(std::min<int64_t>(kBlockN, panel.keys - first_key)), kKeyRows);
      Vec largest[kVectors], alpha[kVectors] = {};
      compute_scores(panel, key_tile, count, first_key, call.into_cap, work.scores, largest);
      bool rescale = update_reference(panel, call.scale, largest, alpha);
      compute_probabilities(panel, call.scale, count, work.scores);
      accumulate_output(panel, value_tile, count / kPerWord, work.scores, rescale, alpha);
    }
  }
  for (int p = 0; p < panels; ++p) finish_panel(call, b, kv_head, work, work.panels[p]);
}

// ---- The call ------------------------------------------------------------------------------

// All heads, in turns of as many as kScratchBytes holds packed. Returns 0, or 1 without memory.
int run(const Call& call, int num_threads) {
  int64_t heads = call.batch * call.num_kv_heads;
  int64_t blocks = (call.rows() + kPanel * kPanels - 1) / (kPanel * kPanels);
  int64_t tiles = (call.seqlen_k + kBlockN - 1) / kBlockN - call.first_tile();
  int64_t head_words = kPrepack ? tiles * (kKeyTileWords + kValueTileWords) : 0;
  int64_t turn = heads;
  if (head_words) {
    int64_t fit = kScratchBytes / int64_t(head_words * sizeof(Word));
    turn = std::min(heads, std::max<int64_t>(fit, 1));
  }
  size_t bytes = sizeof(Workspace) * num_threads + sizeof(Word) * head_words * turn;
  // Not aligned_alloc: what that frees, glibc returns to the system, and the next call pays again
  // for fresh pages (8 % of a call of 12 ms).
  void* memory = std::malloc(bytes + alignof(Workspace));
  if (!memory) return 1;
  constexpr uintptr_t kAlign = alignof(Workspace);
  auto address = (reinterpret_cast<uintptr_t>(memory) + kAlign - 1) / kAlign * kAlign;
  auto* workspaces = reinterpret_cast<Workspace*>(address);
  auto* scratch = reinterpret_cast<Word*>(workspaces + num_threads);

#pragma omp parallel num_threads(num_threads)
  {
    Workspace& work = workspaces[omp_get_thread_num()];
    for (int64_t first = 0; first < heads; first += turn) {
      int64_t count = std::min(turn, heads - first);
      if constexpr (kPrepack) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * tiles; ++task) {
          int64_t head = task / tiles, tile = task % tiles;
          int64_t b = (first + head) / call.num_kv_heads;
          int64_t kv_head = (first + head) % call.num_kv_heads;
          Word* packed = scratch + head * head_words + tile * (kKeyTileWords + kValueTileWords);
          tile += call.first_tile();
          pack_keys(call, call.k + b * call.k_stride_batch + kv_head * call.k_stride_head,
                    tile * kBlockN, packed);
          pack_values(call, call.v + b * call.v_stride_batch + kv_head * call.v_stride_head,
                      tile * kBlockN, packed + kKeyTileWords);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * blocks; ++task) {
        // Under a causal mask the last blocks are the longest: begin with them.
        int64_t head = kLongestFirst ? task % count : task / blocks;
        int64_t block = blocks - 1 - (kLongestFirst ? task / count : task % blocks);
        attend(call, (first + head) / call.num_kv_heads, (first + head) % call.num_kv_heads, block,
               scratch + head * head_words, work);
      }
    }
  }
  std::free(memory);
  return 0;
}

}  // namespace

extern "C" int launch(const void* q, const void* k, const void* v, void* out, float* lse, void* workspace, int32_t batch, int32_t seqlen_q, int32_t seqlen_k, int32_t num_heads, int32_t num_kv_heads, int32_t window_left, int32_t window_right, int64_t q_stride_batch, int64_t q_stride_seq, int64_t q_stride_head, int64_t k_stride_batch, int64_t k_stride_seq, int64_t k_stride_head, int64_t v_stride_batch, int64_t v_stride_seq, int64_t v_stride_head, int64_t out_stride_batch, int64_t out_stride_seq, int64_t out_stride_head, float softcap, float softmax_scale, int num_threads) {
  if (batch == 0 || seqlen_q == 0) return 0;
  constexpr float kLog2E = 1.44269504089f;
  // The largest scaled score belongs to the largest score only if the scale is positive: a
  // negative one changes the sign of Q instead, and zero makes Q zero.
  constexpr Word kSigns = kPairs ? Word(0x80008000) : Word(0x80000000);
  Call call{static_cast<const Element*>(q), static_cast<const Element*>(k),
            static_cast<const Element*>(v), static_cast<Element*>(out), lse,
            batch, seqlen_q, seqlen_k, num_heads, num_kv_heads,
            q_stride_batch, q_stride_seq, q_stride_head,
            k_stride_batch, k_stride_seq, k_stride_head,
            v_stride_batch, v_stride_seq, v_stride_head,
            out_stride_batch, out_stride_seq, out_stride_head,
            // Scores are kept as tanh. Caps beyond these two change nothing, but would overflow.
            std::min(std::max(softcap, 1e-15f), 1e15f) * kLog2E,
            softmax_scale == 0.0f ? 0 : -1, softmax_scale < 0.0f ? kSigns : 0};
  call.into_cap = __builtin_fabsf(softmax_scale) / std::min(std::max(softcap, 1e-15f), 1e15f);
  call.window_left = window_left;
  call.window_right = window_right;
  return run(call, num_threads < 1 ? 1 : num_threads);
}
