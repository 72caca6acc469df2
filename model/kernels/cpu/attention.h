// Attention over the paged KV pool on CPUs: FlashAttention's online softmax (Dao et al., 2022,
// https://arxiv.org/abs/2205.14135) over pages that are read in place. Its plain reference: model/kernels/reference.py.
//
// The work is divided into tasks (attention_task.h); the results of those that share their queries are merged.

#pragma once

#include <atomic>
#include <vector>

#include "attention_task.h"

namespace {
namespace attention {

constexpr int SPLIT_KEYS = 1024;         // fewest keys that are worth a task of their own
constexpr int SPLIT_KEYS_PER_QUERY = 8;  // and for each query, since every split leaves a total per query to be added
constexpr int TASKS = 128;               // about as many for one sequence alone: enough for many threads

// An unfinished softmax over some keys, by query.
struct Partial {
  std::vector<float> peak, weight;  // [queries]
  std::vector<float> total;         // [queries, dim]
  std::atomic<int64_t> done{0};     // in a tile's first: how many of its splits are done
};

// Does a task; its result goes to the output, or to `partials` where its keys are one of several splits.
void compute(const Problem& p, const Task& t, Scratch& s, std::vector<Partial>& partials) {
  const int64_t count = t.last - t.first;
  const bool across = count <= FEW && p.dim % LANES == 0;
  if (across) {
    switch (count) {
      case 1: few<1>(p, t, s); break;
      case 2: few<2>(p, t, s); break;
      case 3: few<3>(p, t, s); break;
      case 4: few<4>(p, t, s); break;
      case 5: few<5>(p, t, s); break;
      case 6: few<6>(p, t, s); break;
      case 7: few<7>(p, t, s); break;
      default: few<8>(p, t, s);
    }
  } else {
    many(p, t, s);
  }
  // By query, then channel; the result itself where there is one split.
  Partial* partial = t.splits > 1 ? &partials[t.partials + t.split] : nullptr;
  if (partial) {
    partial->peak.assign(s.peak, s.peak + count);
    partial->weight.assign(s.weight, s.weight + count);
    partial->total.resize(count * p.dim);
  }
  for (int64_t r = 0; r < count; ++r) {
    float* to = partial ? partial->total.data() + r * p.dim : p.out + p.at(t.seq, t.head, t.first + r);
    const float scale = partial ? 1.0f : 1.0f / s.weight[r];
    const float* from = s.total.begin + (across ? r * p.dim : r / ROWS * p.dim * ROWS + r % ROWS);
    for (int64_t d = 0; d < p.dim; ++d) to[d] = from[across ? d : d * ROWS] * scale;
  }
}

// Merges the partial results of the tasks that share their queries, in the order of their keys; `t` is any of them.
void combine(const Problem& p, const Task& t, const std::vector<Partial>& partials) {
  for (int64_t r = 0; r < t.last - t.first; ++r) {
    float* out = p.out + p.at(t.seq, t.head, t.first + r);
    float peak = MASKED, weight = 0.0f;
    for (int64_t i = 0; i < t.splits; ++i) peak = std::max(peak, partials[t.partials + i].peak[r]);
    std::fill(out, out + p.dim, 0.0f);
    for (int64_t i = 0; i < t.splits; ++i) {
      const Partial& split = partials[t.partials + i];
      const float decay = power_of_2(all(split.peak[r] - peak))[0];
      weight += split.weight[r] * decay;
      for (int64_t d = 0; d < p.dim; ++d) out[d] += split.total[r * p.dim + d] * decay;
    }
    for (int64_t d = 0; d < p.dim; ++d) out[d] /= weight;
  }
}

// Tiles of queries; where a sequence has too few for many threads, its keys are split. The splits depend on the
// sequence's lengths alone, not on the rest of the batch or the threads, so it gets the same bits in any batch. The
// longest tasks come first.
std::vector<Task> tasks_of(const Problem& p) {
  std::vector<Task> tasks;
  int64_t partials = 0;
  for (int64_t s = 0; s < p.seqs; ++s) {
    const int64_t rows = p.rows(s), tiles = p.kv_heads * ((rows + STRIPS * ROWS - 1) / (STRIPS * ROWS));
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t first = 0; first < rows; first += STRIPS * ROWS) {
        const int64_t last = std::min<int64_t>(first + STRIPS * ROWS, rows);
        // Keys before the oldest one that any of the rows sees are not read; they are scored ALIGNMENT at a time.
        const int64_t begin = p.oldest(s, first) / ALIGNMENT * ALIGNMENT, page = begin / p.page_size * p.page_size;
        const int64_t end = p.prefix[s] + (last - 1) / p.group + 1, keys = end - page;
        const int64_t least = std::max<int64_t>(SPLIT_KEYS, SPLIT_KEYS_PER_QUERY * (last - first));
        const int64_t splits = std::clamp<int64_t>(keys / least, 1, TASKS / tiles + 1);
        const int64_t pages = (keys + p.page_size - 1) / p.page_size;
        const int64_t step = (pages + splits - 1) / splits * p.page_size;
        const int64_t count = (keys + step - 1) / step;
        for (int64_t i = 0; i < count; ++i)
          tasks.push_back({s, head, first, last, std::max(begin, page + i * step),
                           std::min(end, page + (i + 1) * step), count, i, partials});
        if (count > 1) partials += count;
      }
  }
  const auto cost = [](const Task& t) { return (t.end - t.begin) * (t.last - t.first); };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  return tasks;
}

// Room for what the tasks leave to be merged; it serves any number of layers, one after the other.
std::vector<Partial> partials_of(const std::vector<Task>& tasks) {
  return std::vector<Partial>(std::count_if(tasks.begin(), tasks.end(), [](const Task& t) { return t.splits > 1; }));
}

// Does a task, and merges the results of those that share its queries if it is the last of them.
void attend(const Problem& p, const Task& t, Scratch& s, std::vector<Partial>& partials) {
  compute(p, t, s, partials);
  if (t.splits == 1 || ++partials[t.partials].done < t.splits) return;
  combine(p, t, partials);
  partials[t.partials].done = 0;
}

}  // namespace attention
}  // namespace
