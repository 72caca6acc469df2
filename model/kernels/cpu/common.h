// What the CPU kernels share: vectors as wide as the machine's.
//
// Results have the same bits for any shape of a loop: sums are written as `fma`, which is one instruction where the
// target has it, and lanes are added by `sum`. The compiler must not contract (-ffp-contract=off): tuned
// for some processors, it would fuse one long sum differently from many short ones.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));  // in memory, at any float
typedef uint32_t LooseWords __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline Words load_words(const void* from) { return *reinterpret_cast<const LooseWords*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Loose*>(to) = value; }
inline Vec all(float value) { return value - Vec{}; }

// Whether the target has an instruction that rounds a * b + c once.
#if defined(__AVX512F__) || (defined(__FMA__) && defined(__AVX__)) || (defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA))
constexpr bool FUSED = true;
#else
constexpr bool FUSED = false;
#endif

// a * b + c, rounded once where FUSED, else after each operation.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && defined(__AVX__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The lanes of a (numbered from 0) and b (from LANES) with these numbers.
template <int... I>
inline Vec lanes(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Int{I...});
#endif
}

// The sum of all lanes: the upper half is added to the lower, and so on.
inline float sum(Vec v) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  const __m256 above = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 eight = _mm512_castps512_ps256(v) + above;
#else
  const __m256 eight = v;
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
#else
  const Vec two = v + lanes<2, 3, 0, 1>(v, v);
#endif
  return two[0] + two[1];
}

// Arrays of sums stay in registers only if every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 16")

// Prefetches floats that will be read soon.
inline void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

// Memory, not initialised, that begins at a cache line: a vector that crosses one is loaded twice.
struct Room {
  std::unique_ptr<float[]> memory;
  float* begin = nullptr;
  int64_t size = 0;

  Room() = default;
  explicit Room(int64_t count) { reserve(count); }

  void reserve(int64_t count) {
    if (count <= size) return;
    size = count;
    memory.reset(new float[count + 16]);
    begin = memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
  }

  float* zeros(int64_t count) {
    reserve(count);
    std::fill(begin, begin + count, 0.0f);
    return begin;
  }
};

constexpr int64_t TASKS_PER_THREAD = 4;  // for an even load where tasks or threads differ in speed

inline int64_t threads_of(const xla::ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// Yields the core to its other hardware thread for a moment.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace
