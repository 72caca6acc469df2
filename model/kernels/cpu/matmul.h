// Matrix products over packed weights. A panel of PANEL outputs lies together, input by input, so the lanes of vectors
// are outputs, weights are read in order, and an input is a number that is broadcast.
//
// A micro-kernel holds the sums of one panel for a few tokens in registers. A sum is added up input by input, in the
// same order for any number of tokens and threads, so a token's result does not depend on the rest of the batch.

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

inline int64_t panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// x [tokens, inputs] with rows `stride` floats apart, times weight [panels, inputs, PANEL].
struct Product {
  const float* x;
  int64_t stride;
  const float* weight;
  int64_t inputs;
};

// A thread's sums of a block of tokens, while a panel's inputs are not all added.
struct Scratch {
  alignas(64) float sums[BLOCK * PANEL];
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

// A panel's outputs for the tokens [first, last), at most BLOCK: calls `put(token, sums)` for each token.
template <typename Put>
void panel(const Product& p, int64_t number, int64_t first, int64_t last, Scratch& scratch, const Put& put) {
  const int64_t count = last - first, tiles = (count + TILE - 1) / TILE;
  const float* w = p.weight + number * p.inputs * PANEL;
  // The weights of the next block are on their way while this block's are used, evenly: a burst would stop the sums.
  const int64_t floats = (PANEL + tiles - 1) / tiles;
  for (int64_t i = 0; i < p.inputs; i += DEPTH) {
    const int64_t depth = std::min(DEPTH, p.inputs - i);
    const float* block = w + i * PANEL;
    for (int64_t n = 0, t = 0; n < tiles; ++n) {
      const int64_t size = (count - t + tiles - n - 1) / (tiles - n);  // tiles of about the same size
      const float* ahead = block + depth * PANEL + n * floats * depth;
      float* sums = scratch.sums + t * PANEL;
      TILES[size](p, first + t, block, i, depth, sums, ahead, floats);
      if (i + depth == p.inputs)
        for (int64_t s = 0; s < size; ++s) put(first + t + s, sums + s * PANEL);
      t += size;
    }
  }
}

// Packs rows of weights, [outputs, inputs], into panels, [panels, inputs, PANEL]. With two `parts` (gate and up), half
// of a panel's outputs come from each half of the rows. What is beyond the outputs is zero.
inline void pack(const float* rows, int64_t outputs, int64_t inputs, int64_t parts, int64_t number, float* to) {
  const int64_t share = PANEL / parts, of_part = outputs / parts;
  std::fill(to, to + inputs * PANEL, 0.0f);
  for (int64_t i = 0; i < inputs; i += LINE)  // so that what is written stays in the first level of cache
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const int64_t row = number * share + lane % share;
      if (row >= of_part) continue;
      const float* from = rows + (lane / share * of_part + row) * inputs;
      for (int64_t k = i; k < std::min(i + LINE, inputs); ++k) to[k * PANEL + lane] = from[k];
    }
}

}  // namespace matmul
}  // namespace
