// A parallel region: phases of tasks, one after the other, that the threads of a call take one by one.
//
// The threads of XLA's pool that join stay until the region is closed. So a phase costs no waking up, and there is no
// thread that a phase waits for unless it works on a task: a thread that starts late joins the phase that it finds.

#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "common.h"

namespace {

constexpr int SPINS = 4096;  // before a thread that waits offers its core to others

template <typename Scratch>
class Region {
 public:
  // Asks `helpers` threads of the pool to join; this thread takes part in any case.
  Region(xla::ffi::ThreadPool& pool, int64_t helpers) : shared(std::make_shared<Shared>()) {
    // A pool whose queue is full runs what it is asked to on this very thread, which would wait for itself.
    for (int64_t i = 0; i < helpers; ++i)
      pool.Schedule([shared = shared, caller = std::this_thread::get_id()] {
        if (std::this_thread::get_id() == caller) return;
        Scratch scratch;
        shared->help(scratch);
      });
  }
  ~Region() { shared->state.store(CLOSED, std::memory_order_release); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Calls `run(scratch, i)` for every i below `count`, each on one of the threads, and waits for all.
  template <typename Run>
  void run(uint64_t count, Run run) {
    if (count == 1) return run(scratch, uint64_t{0});
    // Where there is no memory left, the process ends here: others still work on what an exception would destroy.
    shared->call = [](void* task, Scratch& scratch, uint64_t i) noexcept { (*static_cast<Run*>(task))(scratch, i); };
    shared->task = &run;
    for (uint64_t first = 0; first < count; first += MOST) {
      shared->offset = first;
      const uint64_t some = std::min(count - first, MOST);
      shared->done.store(0, std::memory_order_relaxed);
      generation = (generation + 1) % GENERATIONS;
      shared->state.store(generation << (2 * BITS) | some << BITS, std::memory_order_release);
      while (shared->take(scratch)) {
      }
      for (int waits = 0; shared->done.load(std::memory_order_acquire) < some; ++waits) wait(waits);
    }
  }

  Scratch scratch;  // this thread's

 private:
  // The state is one word, so that a thread takes a task of the phase that it has seen, or none: the number of the
  // phase, its tasks, and the next one of these.
  static constexpr int BITS = 24;
  static constexpr uint64_t MOST = (1 << BITS) - 1, GENERATIONS = 1 << 15, CLOSED = ~uint64_t{0};

  struct Shared {
    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<uint64_t> done{0};
    // Of the phase; they stay as they are while any of its tasks is not done.
    void (*call)(void*, Scratch&, uint64_t) = nullptr;
    void* task = nullptr;
    uint64_t offset = 0;

    bool take(Scratch& scratch) {
      uint64_t seen = state.load(std::memory_order_acquire);
      do {
        if (seen == CLOSED || (seen & MOST) >= (seen >> BITS & MOST)) return false;
      } while (!state.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire));
      call(task, scratch, offset + (seen & MOST));
      done.fetch_add(1, std::memory_order_release);
      return true;
    }

    void help(Scratch& scratch) {
      for (int waits = 0; state.load(std::memory_order_acquire) != CLOSED; ++waits)
        if (take(scratch))
          waits = 0;
        else
          wait(waits);
    }
  };

  static void wait(int waits) { waits < SPINS ? relax() : static_cast<void>(sched_yield()); }

  std::shared_ptr<Shared> shared;  // outlives the region, for threads that start too late
  uint64_t generation = 0;
};

struct Nothing {};

// Calls `run(scratch, i)` for every i below `count`, on the threads of the pool and this one, and waits for all.
template <typename Scratch = Nothing, typename Run>
void divide(xla::ffi::ThreadPool& pool, uint64_t count, Run run) {
  Region<Scratch>(pool, std::min<int64_t>(threads_of(pool), count) - 1).run(count, run);
}

}  // namespace
