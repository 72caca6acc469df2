// Attention over the paged KV pool on CPUs: FlashAttention's online softmax (Dao et al., 2022,
// https://arxiv.org/abs/2205.14135) over pages that are read in place. Its plain reference: model/kernels/reference.py.
//
// Many queries (prefill): a tile of them, transposed once, lies across the lanes of the vectors. Scores are keys
// broadcast against it, so the softmax's maximum and sum are taken between vectors and never within one, and neither
// keys nor values are transposed. Few queries (decode): a key lies across the lanes, and every byte of the cache is
// read once for all query heads of its KV head.

#pragma once

#include <atomic>
#include <vector>

#include "common.h"

namespace {
namespace attention {

constexpr int ROWS = 32;                 // query rows of a strip, which with a block of keys fits the first-level cache
constexpr int STRIPS = 8;                // of a task: each block of keys comes from memory once for all of them
constexpr int KEYS = 64;                 // keys of a block
constexpr int FEW = 8;                   // up to so many queries, a key lies across the lanes
constexpr int FEW_KEYS = 32;             // keys of their block: with its values, they stay in the first-level cache
constexpr int SPLIT_KEYS = 1024;        // fewest keys that are worth a task of their own
constexpr int SPLIT_KEYS_PER_QUERY = 8;  // and for each query, since every split leaves a total per query to be added
constexpr int TASKS = 128;               // about as many for one sequence alone: enough for many threads
constexpr float MASKED = -1e30f;         // finite, so that no difference of two of them is NaN
constexpr float LOG2_E = 1.44269504088896341f;

// A micro-kernel holds the sums of VECS vectors of queries for TOGETHER keys or channels in registers. To broadcast a
// number costs half as much as to load a vector, so it takes more of those.
constexpr int VECS = LANES == 4 ? 4 : 2;
constexpr int TOGETHER = LANES == 16 ? 8 : 4;
constexpr int ALIGNMENT = 4;  // head_dim and page_size are multiples of it

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2 ** x for x <= 0, accurate to the last bits of a float: the integer part goes into the exponent's bits, the rest, at
// most a half, into the Taylor series of exp(x log 2).
inline Vec power_of_2(Vec x) {
  const float shift = 12582912.0f + 127.0f;  // 1.5 * 2 ** 23, which rounds to an integer, and the exponent's bias
  x = x < all(-126.0f) ? all(-126.0f) : x;  // NaN stays NaN
  const Vec shifted = x + shift;
  const Vec power = (Vec)((Int)shifted << 23);
  const Vec f = x - (shifted - shift);
  Vec p = all(1.54035304e-4f);
  p = fma(p, f, all(1.33335581e-3f));
  p = fma(p, f, all(9.61812911e-3f));
  p = fma(p, f, all(5.55041087e-2f));
  p = fma(p, f, all(2.40226507e-1f));
  p = fma(p, f, all(6.93147181e-1f));
  p = fma(p, f, all(1.0f));
  return p * power;
}

struct Problem {
  const float* q;          // [tokens, kv_heads, group, dim]
  const float* k;          // [pages, kv_heads, page_size, dim], of the layer
  const float* v;          // likewise
  const int32_t* starts;   // [seqs + 1]
  const int32_t* prefix;   // [seqs]
  const int32_t* table;    // [seqs, width]
  float* out;              // [tokens, kv_heads, group, dim]
  int64_t tokens, kv_heads, group, dim, pages, page_size, seqs, width;

  int64_t rows(int64_t s) const { return (starts[s + 1] - starts[s]) * group; }
  // Offset of a query or its result.
  int64_t at(int64_t s, int64_t head, int64_t row) const {
    return ((starts[s] + row / group) * kv_heads * group + head * group + row % group) * dim;
  }
  // Offset of a key or its value in the pool; a page out of range, which nothing is written to, is read as the nearest.
  int64_t place(int64_t s, int64_t head, int64_t position) const {
    const int64_t page = std::clamp<int64_t>(table[s * width + position / page_size], 0, pages - 1);
    return ((page * kv_heads + head) * page_size + position % page_size) * dim;
  }
  // Keys from this one on that lie in one page, at most a block of them.
  int64_t slots(int64_t position, int64_t end, int64_t block) const {
    return std::min({end - position, page_size - position % page_size, block});
  }
};

// Queries [first, last) of one KV head of a sequence against its keys [begin, end); keys after a query are left out.
struct Task {
  int64_t seq, head, first, last, begin, end;
  int64_t splits, split;  // tasks that share these queries, and which of them this is
  int64_t partials;       // index of the first one's result among all partial results
};

// An unfinished softmax over some keys, by query.
struct Partial {
  std::vector<float> peak, weight;  // [queries]
  std::vector<float> total;         // [queries, dim]
  std::atomic<int64_t> done{0};     // in a tile's first: how many of its splits are done
};

// Memory that is read soon, of which every step of a loop fetches some floats: what comes evenly comes beside the
// arithmetic, and a burst would stop it.
struct Ahead {
  const float* from;
  int64_t floats;

  void fetch(int64_t step) const { __builtin_prefetch(from + step * floats, 0, 2); }  // the first level is full
  void advance(int64_t steps) { from += steps * floats; }
};

// Scores of SLOTS keys, [slots, ROWS] in powers of two, for N vectors of queries, [dim, ROWS].
template <int N, int SLOTS>
inline void score(const float* keys, const float* queries, float* scores, int64_t dim, Ahead& ahead) {
  Vec sums[SLOTS][N] = {};
  for (int64_t d = 0; d < dim; ++d) {
    ahead.fetch(d);
    Vec q[N];
    UNROLL for (int i = 0; i < N; ++i) q[i] = load(queries + d * ROWS + i * LANES);
    UNROLL for (int s = 0; s < SLOTS; ++s) {
      const Vec key = all(keys[s * dim + d]);
      UNROLL for (int i = 0; i < N; ++i) sums[s][i] = fma(key, q[i], sums[s][i]);
    }
  }
  UNROLL for (int s = 0; s < SLOTS; ++s)
    UNROLL for (int i = 0; i < N; ++i) store(scores + s * ROWS + i * LANES, sums[s][i]);
  ahead.advance(dim);
}

// Adds the values of `slots` keys, weighted by [slots, ROWS], to CHANNELS channels of the totals, [dim, ROWS].
template <int N, int CHANNELS>
inline void weigh(const float* values, const float* weights, float* total, int64_t slots, int64_t dim, Ahead& ahead) {
  Vec sums[CHANNELS][N];
  UNROLL for (int c = 0; c < CHANNELS; ++c)
    UNROLL for (int i = 0; i < N; ++i) sums[c][i] = load(total + c * ROWS + i * LANES);
  for (int64_t s = 0; s < slots; ++s) {
    ahead.fetch(s);
    Vec w[N];
    UNROLL for (int i = 0; i < N; ++i) w[i] = load(weights + s * ROWS + i * LANES);
    UNROLL for (int c = 0; c < CHANNELS; ++c) {
      const Vec value = all(values[s * dim + c]);
      UNROLL for (int i = 0; i < N; ++i) sums[c][i] = fma(value, w[i], sums[c][i]);
    }
  }
  UNROLL for (int c = 0; c < CHANNELS; ++c)
    UNROLL for (int i = 0; i < N; ++i) store(total + c * ROWS + i * LANES, sums[c][i]);
  ahead.advance(slots);
}

// A thread's own memory. Of strips of queries: [strips, dim, ROWS] and [strips, ROWS]; of few queries: [queries, dim].
struct Scratch {
  alignas(64) float scores[KEYS * ROWS];
  alignas(64) float peak[STRIPS * ROWS];
  alignas(64) float weight[STRIPS * ROWS];
  Room queries, total;
};

// Keys of one page and their values, [slots, dim], and the block that is read after it.
struct Block {
  const float *keys, *values, *next_keys, *next_values;
  int64_t slots;
};

// A strip of queries, [dim, ROWS], and its softmax so far; `first` is its first vector of the task's `vecs`.
struct Strip {
  const float* queries;
  float *total, *peak, *weight, *scores;
  int64_t first, vecs;
};

// A block of keys for N vectors of a strip's queries, `at` rows into it, M keys or channels at a time. Key i is seen by
// the rows from `seen_from + i * group` on. Meanwhile these vectors' share of the next block is on its way.
template <int N, int M>
void block(const Problem& p, const Strip& strip, int64_t at, const Block& b, int64_t seen_from) {
  const float* queries = strip.queries + at;
  float *scores = strip.scores + at, *total = strip.total + at;
  const int64_t slots = b.slots, share = slots * p.dim * (strip.first + at / LANES) / strip.vecs;
  const int64_t floats = (N * M + strip.vecs - 1) / strip.vecs;
  Ahead next_keys = {b.next_keys + share, floats}, next_values = {b.next_values + share, floats};
  // Slots after the last one belong to the same page, so reading them is safe; their scores are never used.
  int64_t scored = 0;
  for (; scored + M <= slots; scored += M)
    score<N, M>(b.keys + scored * p.dim, queries, scores + scored * ROWS, p.dim, next_keys);
  for (; scored < slots; scored += ALIGNMENT)
    score<N, ALIGNMENT>(b.keys + scored * p.dim, queries, scores + scored * ROWS, p.dim, next_keys);

  if (seen_from + (slots - 1) * p.group > at) {  // the last key comes after some query
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int32_t from = static_cast<int32_t>(seen_from + slot * p.group - at);
      for (int i = 0; i < N; ++i) {
        Int row;
        for (int lane = 0; lane < LANES; ++lane) row[lane] = i * LANES + lane;
        float* here = scores + slot * ROWS + i * LANES;
        store(here, row >= from ? load(here) : all(MASKED));
      }
    }
  }

  for (int i = 0; i < N; ++i) {
    float *column = scores + i * LANES, *sums = total + i * LANES;
    const Vec before = load(strip.peak + at + i * LANES);
    Vec peaks[4] = {before, before, before, before}, weight = {};  // so that one need not wait for the other
    for (int64_t slot = 0; slot < slots; slot += 4)
      UNROLL for (int j = 0; j < 4; ++j)
        peaks[j] = larger(peaks[j], load(column + std::min(slot + j, slots - 1) * ROWS));
    const Vec peak = larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
    for (int64_t slot = 0; slot < slots; ++slot) {
      const Vec e = power_of_2(load(column + slot * ROWS) - peak);
      store(column + slot * ROWS, e);
      weight += e;
    }
    Vec decay = all(1.0f);
    if (sum(peak - before) != 0.0f) {  // some peak has moved, since none ever falls
      decay = power_of_2(before - peak);
      for (int64_t d = 0; d < p.dim; ++d) store(sums + d * ROWS, load(sums + d * ROWS) * decay);
    }
    store(strip.weight + at + i * LANES, fma(load(strip.weight + at + i * LANES), decay, weight));
    store(strip.peak + at + i * LANES, peak);
  }
  int64_t done = 0;
  for (; done + M <= p.dim; done += M)
    weigh<N, M>(b.values + done, scores, total + done * ROWS, slots, p.dim, next_values);
  for (; done < p.dim; done += ALIGNMENT)
    weigh<N, ALIGNMENT>(b.values + done, scores, total + done * ROWS, slots, p.dim, next_values);
}

// A block of keys for `vecs` vectors of a strip's queries.
template <int M>
void blocks(const Problem& p, const Strip& strip, int64_t vecs, const Block& b, int64_t seen_from) {
  int64_t v = 0;
  for (; v + VECS <= vecs; v += VECS) block<VECS, M>(p, strip, v * LANES, b, seen_from);
  for (; v < vecs; ++v) block<1, M>(p, strip, v * LANES, b, seen_from);
}

float scale_of(const Problem& p) { return LOG2_E / __builtin_sqrtf(static_cast<float>(p.dim)); }

void many(const Problem& p, const Task& t, Scratch& s) {
  const int64_t count = t.last - t.first, strips = (count + ROWS - 1) / ROWS, size = p.dim * ROWS;
  float *queries = s.queries.zeros(strips * size), *total = s.total.zeros(strips * size);
  std::fill(s.peak, s.peak + strips * ROWS, MASKED);
  std::fill(s.weight, s.weight + strips * ROWS, 0.0f);
  const float scale = scale_of(p);
  for (int64_t r = 0; r < count; ++r) {
    const float* query = p.q + p.at(t.seq, t.head, t.first + r);
    for (int64_t d = 0; d < p.dim; ++d) queries[r / ROWS * size + d * ROWS + r % ROWS] = query[d] * scale;
  }
  const int64_t begin = p.place(t.seq, t.head, t.begin), size_of_first = p.slots(t.begin, t.end, KEYS) * p.dim;
  fetch(p.k + begin, size_of_first);
  fetch(p.v + begin, size_of_first);
  for (int64_t key = t.begin, slots; key < t.end; key += slots) {
    slots = p.slots(key, t.end, KEYS);
    const int64_t place = p.place(t.seq, t.head, key);
    const int64_t next = key + slots < t.end ? p.place(t.seq, t.head, key + slots) : place;
    const Block b = {p.k + place, p.v + place, p.k + next, p.v + next, slots};
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t rows = std::min<int64_t>(count - i * ROWS, ROWS), vecs = (rows + LANES - 1) / LANES;
      const int64_t seen_from = (key - p.prefix[t.seq]) * p.group - t.first - i * ROWS;
      if (seen_from >= rows) continue;  // all of its queries come before these keys
      const Strip strip = {queries + i * size, total + i * size, s.peak + i * ROWS, s.weight + i * ROWS, s.scores,
                           i * ROWS / LANES, (count + LANES - 1) / LANES};
      // One vector of queries: more keys and values at a time, so that as many sums are under way.
      if (vecs == 1)
        blocks<VECS * TOGETHER>(p, strip, vecs, b, seen_from);
      else
        blocks<TOGETHER>(p, strip, vecs, b, seen_from);
    }
  }
}

template <int COUNT>
void few(const Problem& p, const Task& t, Scratch& s) {
  const int64_t vecs = p.dim / LANES;
  float *queries = s.queries.zeros(COUNT * p.dim), *total = s.total.zeros(COUNT * p.dim);
  const float scale = scale_of(p);
  for (int r = 0; r < COUNT; ++r) {
    const float* query = p.q + p.at(t.seq, t.head, t.first + r);
    for (int64_t d = 0; d < p.dim; ++d) queries[r * p.dim + d] = query[d] * scale;
    s.peak[r] = MASKED;
    s.weight[r] = 0.0f;
  }
  for (int64_t key = t.begin, slots; key < t.end; key += slots) {
    slots = p.slots(key, t.end, FEW_KEYS);
    const int64_t place = p.place(t.seq, t.head, key);
    const float *keys = p.k + place, *values = p.v + place;
    const float* next = key + slots < t.end ? p.k + p.place(t.seq, t.head, key + slots) : keys;
    for (int64_t slot = 0; slot < slots; ++slot) {
      fetch(values + slot * p.dim, p.dim);
      Vec sums[COUNT] = {};
      for (int64_t i = 0; i < vecs; ++i) {
        const Vec k = load(keys + slot * p.dim + i * LANES);
        for (int r = 0; r < COUNT; ++r) sums[r] = fma(k, load(queries + r * p.dim + i * LANES), sums[r]);
      }
      for (int r = 0; r < COUNT; ++r) s.scores[r * FEW_KEYS + slot] = sum(sums[r]);
    }
    for (int r = 0; r < COUNT; ++r) {
      float* scores = s.scores + r * FEW_KEYS;
      // Row r sees the keys up to its own position.
      const int64_t position = p.prefix[t.seq] + (t.first + r) / p.group;
      const int64_t seen = std::clamp<int64_t>(position + 1 - key, 0, slots);
      for (int64_t slot = seen; slot < FEW_KEYS; ++slot) scores[slot] = MASKED;
      Vec peaks = all(s.peak[r]);
      for (int64_t i = 0; i < FEW_KEYS; i += LANES) peaks = larger(peaks, load(scores + i));
      float peak = s.peak[r];
      for (int lane = 0; lane < LANES; ++lane) peak = std::max(peak, peaks[lane]);
      Vec weights = {};
      for (int64_t i = 0; i < FEW_KEYS; i += LANES) {
        const Vec e = power_of_2(load(scores + i) - peak);
        store(scores + i, e);
        weights += e;
      }
      if (peak != s.peak[r]) {
        const float decay = power_of_2(all(s.peak[r] - peak))[0];
        for (int64_t d = 0; d < p.dim; ++d) total[r * p.dim + d] *= decay;
        s.weight[r] *= decay;
        s.peak[r] = peak;
      }
      s.weight[r] += sum(weights);
    }
    for (int64_t i = 0; i < vecs; ++i) {
      Vec sums[COUNT];
      for (int r = 0; r < COUNT; ++r) sums[r] = load(total + r * p.dim + i * LANES);
      for (int64_t slot = 0; slot < slots; ++slot) {
        const Vec v = load(values + slot * p.dim + i * LANES);
        __builtin_prefetch(next + slot * p.dim + i * LANES, 0, 2);  // the second level: the first is full
        for (int r = 0; r < COUNT; ++r) sums[r] = fma(v, all(s.scores[r * FEW_KEYS + slot]), sums[r]);
      }
      for (int r = 0; r < COUNT; ++r) store(total + r * p.dim + i * LANES, sums[r]);
    }
  }
}

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
        const int64_t keys = p.prefix[s] + (last - 1) / p.group + 1;
        const int64_t least = std::max<int64_t>(SPLIT_KEYS, SPLIT_KEYS_PER_QUERY * (last - first));
        const int64_t splits = std::clamp<int64_t>(keys / least, 1, TASKS / tiles + 1);
        const int64_t pages = (keys + p.page_size - 1) / p.page_size;
        const int64_t step = (pages + splits - 1) / splits * p.page_size;
        const int64_t count = (keys + step - 1) / step;
        for (int64_t i = 0; i < count; ++i)
          tasks.push_back({s, head, first, last, i * step, std::min(keys, (i + 1) * step), count, i, partials});
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
