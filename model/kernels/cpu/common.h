// What the CPU kernels share: vectors as wide as the machine's, and work that a call's threads divide among them.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
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
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));  // in memory, at any float

inline Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Loose*>(to) = value; }
inline Vec all(float value) { return value - Vec{}; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Asks for floats that will be read soon, while there is something else to do.
inline void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

constexpr int64_t TASKS_PER_THREAD = 4;  // for an even load where tasks and threads differ
constexpr int SPINS = 4096;

inline int64_t threads_of(const xla::ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// Leaves the core to its other thread for a moment.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Tasks that the threads of a call take one by one. It outlives the call for those that come too late.
template <typename Run>
struct Work {
  Run run;  // (thread's own memory, number of the task)
  size_t count;
  std::atomic<size_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  Work(Run run, size_t count) : run(std::move(run)), count(count) {}

  template <typename Scratch>
  void take_part() {
    Scratch scratch;
    size_t mine = 0;
    for (size_t i; (i = next.fetch_add(1)) < count; ++mine) run(scratch, i);
    if (!mine) return;
    std::lock_guard<std::mutex> lock(mutex);
    if ((done += mine) == count) finished.notify_all();
  }
};

struct Nothing {};

// Returns when `run(scratch, i)` has been called for every i below `count`, on the threads of the pool and this one.
template <typename Scratch = Nothing, typename Run>
void divide(xla::ffi::ThreadPool& pool, size_t count, Run run) {
  auto work = std::make_shared<Work<Run>>(std::move(run), count);
  const int64_t helpers = std::min<int64_t>(threads_of(pool), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->template take_part<Scratch>(); });
  // This thread may be one of the pool's: it never waits for work that nobody has begun.
  work->template take_part<Scratch>();
  // The other threads have one task each left, at most: to sleep and be woken takes longer than most of these.
  for (int i = 0; i < SPINS && work->done < count; ++i) relax();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done == count; });
}

}  // namespace
