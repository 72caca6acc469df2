// Matrix products over packed weights. A panel of PANEL outputs lies together, input by input, so the lanes of vectors
// are outputs, weights are read in order, and an input is a number that is broadcast.
//
// A micro-kernel holds the sums of one panel for a few tokens in registers. A sum is added up input by input, in the
// same order for any number of tokens and threads, so a token's result does not depend on the rest of the batch.
//
// Quantised weights become float32 in registers, for few tokens, or a block of a panel at a time, for many: either way
// they are the same numbers, and their sums those of a float32 matrix that holds them.

#pragma once

#include <cstring>

#include "common.h"

namespace {
namespace matmul {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTORS = 4;  // of a panel; with TILE tokens, their sums, weights and an input fit in 32 registers
#else
constexpr int VECTORS = 2;  // the same in 16
#endif
constexpr int TILE = 6;  // tokens of a micro-kernel, at most
constexpr int PANEL = VECTORS * LANES;
constexpr int64_t BLOCK = 192;                 // tokens for which a panel's weights stay in the first level of cache
constexpr int64_t DEPTH = (1 << 13) / PANEL;   // inputs of a panel that fit there
constexpr int64_t LINE = 16;                   // floats of a cache line
constexpr int64_t FETCH = 1 << 13;             // bytes between quantised weights that are used and those on their way

inline int64_t panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

constexpr int64_t WORD = 8;  // 4-bit values in 32 bits

// A matrix in panels, by the bits of a value: 32: float32 [panels, inputs, PANEL]; 8: int8, likewise; 4: uint32 [panels,
// words, PANEL], each WORD inputs of an output, the first in the lowest bits. Of quantised ones, a weight is value *
// scale + offset, those of its group of inputs, [panels, groups, PANEL]; without offsets, values of 4 bits count from 8.
struct Weight {
  const void* values;
  int bits = 32;
  int64_t group = 0;  // of 4 bits, a multiple of WORD, or all inputs
  const float* scales = nullptr;
  const float* offsets = nullptr;

  // The matrix from this panel on.
  Weight after(int64_t number, int64_t inputs) const {
    const int64_t size = group ? number * ((inputs + group - 1) / group) * PANEL : 0;
    return {static_cast<const char*>(values) + number * bytes(inputs), bits, group, scales ? scales + size : nullptr,
            offsets ? offsets + size : nullptr};
  }

  int64_t bytes(int64_t inputs) const {  // of a panel
    return PANEL * (bits == 4 ? (inputs + WORD - 1) / WORD * 4 : inputs * bits / 8);
  }
};

// x [tokens, inputs] with rows `stride` floats apart, times a matrix.
struct Product {
  const float* x;
  int64_t stride;
  Weight weight;
  int64_t inputs;
};

struct Scratch {
  alignas(64) float sums[BLOCK * PANEL];      // of a block of tokens, while a panel's inputs are not all added
  alignas(64) float weights[DEPTH * PANEL];  // of a block of a panel's inputs, if they are quantised
};

// Adds `depth` inputs of T tokens to their sums, and fetches `floats` of the weights `ahead` for each input.
template <int T>
inline void add(const float* x, int64_t stride, const float* w, int64_t depth, Vec (&sums)[T][VECTORS],
                const float* ahead, int64_t floats) {
  const int64_t lines = (floats + LINE - 1) / LINE;
  for (int64_t i = 0; i < depth; ++i, w += PANEL) {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(ahead + i * floats + line * LINE, 0, 2);
    Vec weights[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) weights[v] = load(w + v * LANES);
    UNROLL for (int t = 0; t < T; ++t) {
      const Vec input = all(x[t * stride + i]);
      UNROLL for (int v = 0; v < VECTORS; ++v) sums[t][v] = fma(input, weights[v], sums[t][v]);
    }
  }
}

// Adds the inputs [i, i + depth) of T tokens, the first of which is `t`, to their sums, [T, PANEL].
template <int T>
void tile(const Product& p, int64_t t, const float* w, int64_t i, int64_t depth, float* kept, const float* ahead,
          int64_t floats) {
  Vec sums[T][VECTORS];
  UNROLL for (int s = 0; s < T; ++s)
    UNROLL for (int v = 0; v < VECTORS; ++v) sums[s][v] = i ? load(kept + s * PANEL + v * LANES) : Vec{};
  add<T>(p.x + t * p.stride + i, p.stride, w, depth, sums, ahead, floats);
  UNROLL for (int s = 0; s < T; ++s)
    UNROLL for (int v = 0; v < VECTORS; ++v) store(kept + s * PANEL + v * LANES, sums[s][v]);
}

constexpr decltype(&tile<1>) TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};  // by tokens

// LANES values as numbers: of 8 bits, and the k-th of 4 bits in each of so many words.
inline Vec numbers(const int8_t* values) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
  int32_t four;
  std::memcpy(&four, values, sizeof(four));
  return (Vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
#else
  Vec found;
  UNROLL for (int lane = 0; lane < LANES; ++lane) found[lane] = values[lane];
  return found;
#endif
}
inline Vec numbers(Words words, int k) {
#if defined(__AVX512F__)  // which looks them up by a lane's lowest four bits
  const __m512 sixteen = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps((__m512i)(words >> (4 * k)), sixteen);
#else
  return __builtin_convertvector((Int)(words >> (4 * k) & 15), Vec);
#endif
}

// Calls `use(i, weights)` for the inputs [i, end) of a panel one by one, with their weights in VECTORS vectors. With 4
// bits, `i` is a multiple of WORD.
template <int BITS, typename Use>
inline void each_input(const Weight& w, int64_t number, int64_t inputs, int64_t i, int64_t end, const Use& use) {
  constexpr int64_t STEP = BITS == 8 ? 1 : WORD, BYTES = PANEL * (BITS == 8 ? 1 : 4);  // of STEP inputs
  const int64_t groups = (inputs + w.group - 1) / w.group;
  const auto* values = static_cast<const int8_t*>(w.values) + number * w.bytes(inputs) + i / STEP * BYTES;
  while (i < end) {
    const int64_t group = i / w.group, stop = std::min(end, (group + 1) * w.group);
    // Rounded once, value * scale - 8 * scale is (value - 8) * scale; where it is rounded twice, 8 is taken off first.
    const float middle = BITS == 8 || w.offsets ? 0.0f : 8.0f;
    const Vec before = all(FUSED ? 0.0f : middle);
    Vec scales[VECTORS], offsets[VECTORS], weights[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = (number * groups + group) * PANEL + v * LANES;
      scales[v] = load(w.scales + at);
      offsets[v] = w.offsets ? load(w.offsets + at) : scales[v] * (FUSED ? -middle : 0.0f);
    }
    for (; i < stop; values += BYTES) {
      for (int64_t byte = 0; byte < BYTES; byte += 4 * LINE) __builtin_prefetch(values + FETCH + byte, 0, 2);
      if constexpr (BITS == 8) {
        UNROLL for (int v = 0; v < VECTORS; ++v) weights[v] = fma(numbers(values + v * LANES), scales[v], offsets[v]);
        use(i++, weights);
      } else {
        Words words[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; ++v) words[v] = load_words(values + v * LANES * 4);
        const auto one = [&](int k) {
          UNROLL for (int v = 0; v < VECTORS; ++v) {
            const Vec value = FUSED ? numbers(words[v], k) : numbers(words[v], k) - before;
            weights[v] = fma(value, scales[v], offsets[v]);
          }
          use(i++, weights);
        };
        if (stop - i >= WORD) {
          UNROLL for (int k = 0; k < WORD; ++k) one(k);
        } else {
          for (int k = 0; i < stop; ++k) one(k);
        }
      }
    }
  }
}

// All outputs of a panel for T tokens, the first of which is `t`, to `sums`, [T, PANEL].
template <int BITS, int T>
void few(const Product& p, int64_t t, int64_t number, float* to) {
  const float* x = p.x + t * p.stride;
  const int64_t stride = p.stride;
  Vec sums[T][VECTORS] = {};
  each_input<BITS>(p.weight, number, p.inputs, 0, p.inputs, [&](int64_t i, const Vec(&weights)[VECTORS]) {
    UNROLL for (int s = 0; s < T; ++s) {
      const Vec input = all(x[s * stride + i]);
      UNROLL for (int v = 0; v < VECTORS; ++v) sums[s][v] = fma(input, weights[v], sums[s][v]);
    }
  });
  UNROLL for (int s = 0; s < T; ++s)
    UNROLL for (int v = 0; v < VECTORS; ++v) store(to + s * PANEL + v * LANES, sums[s][v]);
}

template <int BITS>
constexpr decltype(&few<BITS, 1>) FEW[] = {nullptr,      few<BITS, 1>, few<BITS, 2>, few<BITS, 3>,
                                           few<BITS, 4>, few<BITS, 5>, few<BITS, 6>};  // by tokens

// A panel's outputs for the tokens [first, last), at most BLOCK, block by block of its inputs: calls `put(token, sums)`
// for each token. `block(i, depth)` are the weights of `depth` inputs from `i` on, [depth, PANEL]. Of what lies behind
// them, which is read next, `floats` for each input are fetched.
template <typename Block, typename Put>
void in_blocks(const Product& p, int64_t first, int64_t last, int64_t floats, Scratch& scratch, const Block& block,
               const Put& put) {
  const int64_t count = last - first, tiles = (count + TILE - 1) / TILE;
  // They are on their way while this block's weights are used, evenly: a burst would stop the sums.
  floats = (floats + tiles - 1) / tiles;
  for (int64_t i = 0; i < p.inputs; i += DEPTH) {
    const int64_t depth = std::min(DEPTH, p.inputs - i);
    const float* weights = block(i, depth);
    for (int64_t n = 0, t = 0; n < tiles; ++n) {
      const int64_t size = (count - t + tiles - n - 1) / (tiles - n);  // tiles of about the same size
      const float* ahead = weights + depth * PANEL + n * floats * depth;
      float* sums = scratch.sums + t * PANEL;
      TILES[size](p, first + t, weights, i, depth, sums, ahead, floats);
      if (i + depth == p.inputs)
        for (int64_t s = 0; s < size; ++s) put(first + t + s, sums + s * PANEL);
      t += size;
    }
  }
}

// The same of quantised weights, which few tokens use as they come, and for many are written down block by block.
template <int BITS, typename Put>
void quantised(const Product& p, int64_t number, int64_t first, int64_t last, Scratch& scratch, const Put& put) {
  if (last - first <= TILE) {
    FEW<BITS>[last - first](p, first, number, scratch.sums);
    for (int64_t token = first; token < last; ++token) put(token, scratch.sums + (token - first) * PANEL);
    return;
  }
  const auto block = [&](int64_t begin, int64_t depth) {
    each_input<BITS>(p.weight, number, p.inputs, begin, begin + depth, [&](int64_t i, const Vec(&weights)[VECTORS]) {
      float* to = scratch.weights + (i - begin) * PANEL;
      UNROLL for (int v = 0; v < VECTORS; ++v) store(to + v * LANES, weights[v]);
    });
    return scratch.weights;
  };
  in_blocks(p, first, last, 0, scratch, block, put);
}

// A panel's outputs for the tokens [first, last), at most BLOCK: calls `put(token, sums)` for each token.
template <typename Put>
void panel(const Product& p, int64_t number, int64_t first, int64_t last, Scratch& scratch, const Put& put) {
  if (p.weight.bits == 8) return quantised<8>(p, number, first, last, scratch, put);
  if (p.weight.bits == 4) return quantised<4>(p, number, first, last, scratch, put);
  const float* weights = static_cast<const float*>(p.weight.values) + number * p.inputs * PANEL;
  const auto block = [&](int64_t i, int64_t) { return weights + i * PANEL; };
  in_blocks(p, first, last, PANEL, scratch, block, put);
}

// Packs rows of weights, [outputs, inputs], into panels, [panels, inputs, PANEL]. With two `parts` (gate and up), half
// of a panel's outputs come from each half of the rows. What is beyond the outputs is zero.
template <typename T>
void pack(const T* rows, int64_t outputs, int64_t inputs, int64_t parts, int64_t number, T* to) {
  const int64_t share = PANEL / parts, of_part = outputs / parts;
  std::fill(to, to + inputs * PANEL, T{});
  for (int64_t i = 0; i < inputs; i += LINE)  // so that what is written stays in the first level of cache
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const int64_t row = number * share + lane % share;
      if (row >= of_part) continue;
      const T* from = rows + (lane / share * of_part + row) * inputs;
      for (int64_t k = i; k < std::min(i + LINE, inputs); ++k) to[k * PANEL + lane] = from[k];
    }
}

}  // namespace matmul
}  // namespace
