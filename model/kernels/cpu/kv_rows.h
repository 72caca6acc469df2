// A row of the KV pool, one token's key or value of one head: floats, or numbers of 8 bits and the four bytes of their
// scale. The plain reference: model/kv_rows.py.

#pragma once

#include <cmath>
#include <cstring>

#include "common.h"

namespace {
namespace kv {

enum class Rows { FLOAT32, INT8, FP8 };

inline int64_t bytes_of(Rows rows, int64_t dim) { return rows == Rows::FLOAT32 ? dim * 4 : dim + 4; }

// What a pool of this dtype holds; another one is told from it by `known`.
inline bool known(xla::ffi::DataType dtype, Rows& rows) {
  rows = dtype == xla::ffi::S8 ? Rows::INT8 : dtype == xla::ffi::U8 ? Rows::FP8 : Rows::FLOAT32;
  return rows != Rows::FLOAT32 || dtype == xla::ffi::F32;
}

// head_dim of a pool whose last axis has so many elements.
inline int64_t dim_of(Rows rows, int64_t elements) { return rows == Rows::FLOAT32 ? elements : elements - 4; }

// The numbers of an 8-bit float with 4 bits of exponent and 3 of mantissa (E4M3, https://arxiv.org/abs/2209.05433).
struct Numbers {
  float of[256];

  Numbers() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
      of[code] = (code & 127) == 127 ? NAN : code & 128 ? -size : size;
    }
  }
};

inline const Numbers numbers;

// The nearest of them, ties to even, of a float that is no larger than they are.
inline uint8_t nearest(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint8_t sign = bits >> 24 & 128;
  const float size = std::fabs(x);
  if (!(size < 464.0f)) return sign | (size >= 464.0f ? 126 : 127);
  if (size < 0.015625f) return sign | static_cast<uint8_t>(std::lrint(size * 512.0f));
  bits &= 0x7fffffff;
  bits += 0x7ffff + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((bits >> 20) - (120 << 3));
}

inline void encode(Rows rows, const float* from, int64_t dim, char* to) {
  if (rows == Rows::FLOAT32) {
    std::memcpy(to, from, dim * 4);
    return;
  }
  float largest = 0.0f, wrong = 0.0f;  // not zero if any number is infinite or none
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(from[d]));
  for (int64_t d = 0; d < dim; ++d) wrong += from[d] - from[d];
  const float scale = (largest + wrong) / (rows == Rows::INT8 ? 127.0f : 448.0f), by = scale == 0.0f ? 1.0f : scale;
  for (int64_t d = 0; d < dim; ++d)
    to[d] = static_cast<char>(rows == Rows::INT8 ? std::lrint(from[d] / by) : nearest(from[d] / by));
  std::memcpy(to + dim, &scale, 4);
}

// `count` rows as floats, [count, dim]: those in place, or decoded to `room`.
inline const float* decoded(Rows rows, const char* from, int64_t count, int64_t dim, float* room) {
  if (rows == Rows::FLOAT32) return reinterpret_cast<const float*>(from);
  for (int64_t i = 0; i < count; ++i, from += dim + 4) {
    float scale;
    std::memcpy(&scale, from + dim, 4);
    float* to = room + i * dim;
    if (rows == Rows::INT8)
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(static_cast<int8_t>(from[d])) * scale;
    else
      for (int64_t d = 0; d < dim; ++d) to[d] = numbers.of[static_cast<uint8_t>(from[d])] * scale;
  }
  return room;
}

}  // namespace kv
}  // namespace
