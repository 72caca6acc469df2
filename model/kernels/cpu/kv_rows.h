// A row of the KV pool, one token's key or value of one head: floats, or numbers of 8 bits, then the scales of groups of
// them in bfloat16. The plain reference: model/kv_rows.py.

#pragma once

#include <cmath>
#include <cstring>

#include "common.h"

namespace {
namespace kv {

enum class Rows { FLOAT32, INT8, FP8 };

constexpr int64_t GROUP = 16, SCALE_BYTES = 2;  // numbers that share a scale, and its bytes

inline int64_t bytes_of(Rows rows, int64_t dim) {
  return rows == Rows::FLOAT32 ? dim * 4 : dim + (dim + GROUP - 1) / GROUP * SCALE_BYTES;
}

// What a pool of this dtype holds; another one is told from it by `known`.
inline bool known(xla::ffi::DataType dtype, Rows& rows) {
  rows = dtype == xla::ffi::S8 ? Rows::INT8 : dtype == xla::ffi::U8 ? Rows::FP8 : Rows::FLOAT32;
  return rows != Rows::FLOAT32 || dtype == xla::ffi::F32;
}

// head_dim of a pool whose last axis has so many elements.
inline int64_t dim_of(Rows rows, int64_t elements) {
  constexpr int64_t SIZE = GROUP + SCALE_BYTES;
  return rows == Rows::FLOAT32 ? elements : elements - (elements + SIZE - 1) / SIZE * SCALE_BYTES;
}

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

// The upper half of a float's bits, which a bfloat16 is, rounded to nearest, ties to even; and the float with that half.
inline uint16_t upper_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
inline float with_upper_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Encodes a group of at most GROUP numbers, and returns its scale.
inline uint16_t encode_group(Rows rows, const float* from, int64_t count, char* to) {
  float largest = 0.0f, wrong = 0.0f;  // not zero if any number is infinite or none
  for (int64_t d = 0; d < count; ++d) largest = std::max(largest, std::fabs(from[d]));
  for (int64_t d = 0; d < count; ++d) wrong += from[d] - from[d];
  uint16_t half = upper_half((largest + wrong) / (rows == Rows::INT8 ? 127.0f : 448.0f));
  if (half < 0x80) half = 0;  // less than the smallest normal number
  const float by = half ? with_upper_half(half) : 1.0f;
  for (int64_t d = 0; d < count; ++d)
    to[d] = static_cast<char>(rows == Rows::INT8 ? std::lrint(from[d] / by) : nearest(from[d] / by));
  return half;
}

inline void encode(Rows rows, const float* from, int64_t dim, char* to) {
  if (rows == Rows::FLOAT32) {
    std::memcpy(to, from, dim * 4);
    return;
  }
  char* scale = to + dim;
  for (int64_t d = 0; d < dim; d += GROUP, scale += SCALE_BYTES) {
    const uint16_t half = encode_group(rows, from + d, std::min(GROUP, dim - d), to + d);
    std::memcpy(scale, &half, SCALE_BYTES);
  }
}

// Multiplies the groups of a row by their scales.
inline void scale_groups(const char* scales, int64_t dim, float* row) {
  for (int64_t d = 0; d < dim; d += GROUP, scales += SCALE_BYTES) {
    uint16_t half;
    std::memcpy(&half, scales, SCALE_BYTES);
    const float scale = with_upper_half(half);
    if (dim - d >= GROUP)
      UNROLL for (int64_t i = 0; i < GROUP; i += LANES) store(row + d + i, load(row + d + i) * scale);
    else
      for (int64_t i = d; i < dim; ++i) row[i] *= scale;
  }
}

// `count` rows as floats, [count, dim]: those in place, or decoded to `room`.
inline const float* decoded(Rows rows, const char* from, int64_t count, int64_t dim, float* room) {
  if (rows == Rows::FLOAT32) return reinterpret_cast<const float*>(from);
  const int64_t bytes = bytes_of(rows, dim);
  for (int64_t i = 0; i < count; ++i) {
    const char* row = from + i * bytes;
    float* to = room + i * dim;
    if (rows == Rows::INT8)
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(static_cast<int8_t>(row[d]));
    else
      for (int64_t d = 0; d < dim; ++d) to[d] = numbers.of[static_cast<uint8_t>(row[d])];
  }
  // In a loop of its own: a vector that is loaded right after narrower ones were stored there waits for them.
  for (int64_t i = 0; i < count; ++i) scale_groups(from + i * bytes + dim, dim, room + i * dim);
  return room;
}

}  // namespace kv
}  // namespace
