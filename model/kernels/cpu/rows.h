// What a layer does to rows of numbers, one token's each: norm, rotation, activation, and products of blocks of them.

#pragma once

#include <cstring>

#include "attention.h"
#include "matmul.h"

namespace {

// The sum of squares.
inline float squares(const float* x, int64_t count) {
  Vec sums = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sums = fma(load(x + i), load(x + i), sums);
  float total = sum(sums);
  for (; i < count; ++i) total += x[i] * x[i];
  return total;
}

// Root-mean-square norm of one row.
inline void norm(const float* x, const float* weight, float eps, int64_t count, float* to) {
  const float scale = 1.0f / __builtin_sqrtf(squares(x, count) / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] * scale * weight[i];
}

// Rotates the pairs (i, i + pairs) of one head; the dimensions after them stay as they are.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t pairs, int64_t dim, float* to) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float first = x[i], second = x[i + pairs];
    to[i] = first * cos[i] - second * sin[i];
    to[i + pairs] = second * cos[i] + first * sin[i];
  }
  std::copy(x + 2 * pairs, x + dim, to + 2 * pairs);
}

// x / (1 + exp(-x)).
inline Vec silu(Vec x) {
  const Vec e = attention::power_of_2((x < Vec{} ? x : -x) * attention::LOG2_E);
  return x * (x < Vec{} ? e : all(1.0f)) / (e + 1.0f);
}

// Adds a panel's biases to its sums; null is none.
inline void add_bias(const float* bias, int64_t panel, float* sums) {
  if (!bias) return;
  for (int i = 0; i < matmul::PANEL; i += LANES) store(sums + i, load(sums + i) + load(bias + panel * matmul::PANEL + i));
}

// A panel's finished sums, or as many of them as there are outputs.
inline void write(const float* sums, float* to, int64_t count) {
  std::memcpy(to, sums, std::min<int64_t>(count, matmul::PANEL) * sizeof(float));
}

// The outputs of a product in the panels [from, to) for the tokens [first, last): calls `put(token, panel, sums)`.
template <typename Put>
void multiply(const matmul::Product& product, int64_t first, int64_t last, int64_t from, int64_t to,
              matmul::Scratch& scratch, const Put& put) {
  for (int64_t at = first, end; at < last; at = end) {
    end = std::min(at + matmul::BLOCK, last);
    for (int64_t panel = from; panel < to; ++panel)
      matmul::panel(product, panel, at, end, scratch, [&](int64_t token, float* sums) { put(token, panel, sums); });
  }
}

}  // namespace
