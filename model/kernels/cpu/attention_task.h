// One task of attention on CPUs: some queries of one KV head against some of its keys; see attention.h.
//
// Many queries (prefill): a tile of them, transposed once, lies across the lanes of the vectors. Scores are keys
// broadcast against it, so the softmax's maximum and sum are taken between vectors and never within one, and neither
// keys nor values are transposed. Few queries (decode): a key lies across the lanes, and every byte of the cache is
// read once for all query heads of its KV head.

#pragma once

#include "common.h"
#include "kv_rows.h"

namespace {
namespace attention {

constexpr int ROWS = 32;                 // query rows of a strip, which with a block of keys fits the first-level cache
constexpr int STRIPS = 8;                // of a task: each block of keys comes from memory once for all of them
constexpr int KEYS = 64;                 // keys of a block
constexpr int FEW = 8;                   // up to so many queries, a key lies across the lanes
constexpr int FEW_KEYS = 32;             // keys of their block: with its values, they stay in the first-level cache
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
  const char* k;           // [pages, kv_heads, page_size] rows, of the layer
  const char* v;           // likewise
  const int32_t* starts;   // [seqs + 1]
  const int32_t* prefix;   // [seqs]
  const int32_t* table;    // [seqs, width]
  float* out;              // [tokens, kv_heads, group, dim]
  int64_t tokens, kv_heads, group, dim, pages, page_size, seqs, width;
  int64_t window;          // keys that a query sees, itself included
  const float* sinks;      // [kv_heads, group], logits that have no value; null if there are none
  kv::Rows kind;           // of k and v

  // The first key that a query row sees.
  int64_t oldest(int64_t s, int64_t row) const { return std::max<int64_t>(prefix[s] + row / group - window + 1, 0); }
  int64_t rows(int64_t s) const { return (starts[s + 1] - starts[s]) * group; }
  // Offset of a query or its result.
  int64_t at(int64_t s, int64_t head, int64_t row) const {
    return ((starts[s] + row / group) * kv_heads * group + head * group + row % group) * dim;
  }
  // The row of a key or its value in the pool; a page out of range, which nothing is written to, is read as the nearest.
  int64_t place(int64_t s, int64_t head, int64_t position) const {
    const int64_t page = std::clamp<int64_t>(table[s * width + position / page_size], 0, pages - 1);
    return (page * kv_heads + head) * page_size + position % page_size;
  }
  const char* row(const char* side, int64_t place) const { return side + place * kv::bytes_of(kind, dim); }
  // Keys or values from a row on, as floats: in place, or decoded to `room`.
  const float* floats(const char* side, int64_t place, int64_t slots, float* room) const {
    return kv::decoded(kind, row(side, place), slots, dim, room);
  }
  // Where the next ones are read from, to be fetched early; of what is decoded, the room, which is there already.
  const float* next(const char* side, int64_t place, const float* room) const {
    return kind == kv::Rows::FLOAT32 ? reinterpret_cast<const float*>(row(side, place)) : room;
  }
  // Keys from this one on that lie in one page, at most a block of them.
  int64_t slots(int64_t position, int64_t end, int64_t block) const {
    return std::min({end - position, page_size - position % page_size, block});
  }
};

// Queries [first, last) of one KV head of a sequence against its keys [begin, end). A query leaves out the keys after
// itself and before its window.
struct Task {
  int64_t seq, head, first, last, begin, end;
  int64_t splits, split;  // tasks that share these queries, and which of them this is
  int64_t partials;       // index of the first one's result among all partial results
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
  Room queries, total, keys, values;

  // Of a block of keys and values that are decoded: [KEYS, dim], and what a whole vector of them reads beyond.
  void reserve_block(const Problem& p) {
    if (p.kind == kv::Rows::FLOAT32) return;
    keys.reserve((KEYS + ALIGNMENT) * p.dim);
    values.reserve((KEYS + ALIGNMENT) * p.dim);
  }
};

// The softmax of a task's query before its first key: empty, or its sink, which the first of several splits counts.
inline void begin_row(const Problem& p, const Task& t, int64_t r, Scratch& s) {
  const bool sink = p.sinks && t.split == 0;
  s.peak[r] = sink ? p.sinks[t.head * p.group + (t.first + r) % p.group] * LOG2_E : MASKED;
  s.weight[r] = sink ? 1.0f : 0.0f;
}

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

// Which rows of a strip see the keys of a block: key i is seen from row `from + i * group` on, until row
// `until + i * group`, whose window begins after it.
struct Seen {
  int64_t from, until;
};

// Masks the scores, [slots, ROWS], of the keys that N vectors of rows do not see.
template <int N>
__attribute__((noinline)) void hide_unseen(float* scores, int64_t slots, int64_t group, Seen seen) {
  constexpr int64_t rows = N * LANES;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t from = static_cast<int32_t>(seen.from + slot * group);
    const int32_t until = static_cast<int32_t>(std::min(seen.until + slot * group, rows));
    for (int i = 0; i < N; ++i) {
      Int row;
      for (int lane = 0; lane < LANES; ++lane) row[lane] = i * LANES + lane;
      float* here = scores + slot * ROWS + i * LANES;
      store(here, (row >= from) & (row < until) ? load(here) : all(MASKED));
    }
  }
}

// A block of keys for N vectors of a strip's queries, `at` rows into it, M keys or channels at a time. Meanwhile these
// vectors' share of the next block is on its way.
template <int N, int M>
void block(const Problem& p, const Strip& strip, int64_t at, const Block& b, Seen seen) {
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

  // The last key comes after some query, or the first one before the window of some.
  if (seen.from + (slots - 1) * p.group > at || seen.until < at + N * LANES)
    hide_unseen<N>(scores, slots, p.group, {seen.from - at, seen.until - at});

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
void blocks(const Problem& p, const Strip& strip, int64_t vecs, const Block& b, Seen seen) {
  int64_t v = 0;
  for (; v + VECS <= vecs; v += VECS) block<VECS, M>(p, strip, v * LANES, b, seen);
  for (; v < vecs; ++v) block<1, M>(p, strip, v * LANES, b, seen);
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
    begin_row(p, t, r, s);
  }
  const int64_t begin = p.place(t.seq, t.head, t.begin);
  const int64_t size_of_first = p.slots(t.begin, t.end, KEYS) * kv::bytes_of(p.kind, p.dim) / 4;
  fetch(reinterpret_cast<const float*>(p.row(p.k, begin)), size_of_first);
  fetch(reinterpret_cast<const float*>(p.row(p.v, begin)), size_of_first);
  s.reserve_block(p);
  for (int64_t key = t.begin, slots; key < t.end; key += slots) {
    slots = p.slots(key, t.end, KEYS);
    const int64_t place = p.place(t.seq, t.head, key);
    const int64_t next = key + slots < t.end ? p.place(t.seq, t.head, key + slots) : place;
    const Block b = {p.floats(p.k, place, slots, s.keys.begin), p.floats(p.v, place, slots, s.values.begin),
                     p.next(p.k, next, s.keys.begin), p.next(p.v, next, s.values.begin), slots};
    for (int64_t i = 0; i < strips; ++i) {
      const int64_t rows = std::min<int64_t>(count - i * ROWS, ROWS), vecs = (rows + LANES - 1) / LANES;
      const int64_t seen_from = (key - p.prefix[t.seq]) * p.group - t.first - i * ROWS;
      if (seen_from >= rows) continue;  // all of its queries come before these keys
      const Seen seen = {seen_from, seen_from + p.window * p.group};
      if (seen.until + (slots - 1) * p.group <= 0) continue;  // the windows of all of its queries begin after them
      const Strip strip = {queries + i * size, total + i * size, s.peak + i * ROWS, s.weight + i * ROWS, s.scores,
                           i * ROWS / LANES, (count + LANES - 1) / LANES};
      // One vector of queries: more keys and values at a time, so that as many sums are under way.
      if (vecs == 1)
        blocks<VECS * TOGETHER>(p, strip, vecs, b, seen);
      else
        blocks<TOGETHER>(p, strip, vecs, b, seen);
    }
  }
}

template <int COUNT>
void few(const Problem& p, const Task& t, Scratch& s) {
  const int64_t vecs = p.dim / LANES;
  s.reserve_block(p);
  float *queries = s.queries.zeros(COUNT * p.dim), *total = s.total.zeros(COUNT * p.dim);
  const float scale = scale_of(p);
  for (int r = 0; r < COUNT; ++r) {
    const float* query = p.q + p.at(t.seq, t.head, t.first + r);
    for (int64_t d = 0; d < p.dim; ++d) queries[r * p.dim + d] = query[d] * scale;
    begin_row(p, t, r, s);
  }
  for (int64_t key = t.begin, slots; key < t.end; key += slots) {
    slots = p.slots(key, t.end, FEW_KEYS);
    const int64_t place = p.place(t.seq, t.head, key);
    const float* keys = p.floats(p.k, place, slots, s.keys.begin);
    const float* values = p.floats(p.v, place, slots, s.values.begin);
    const float* next = key + slots < t.end ? p.next(p.k, p.place(t.seq, t.head, key + slots), keys) : keys;
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
      // Row r sees the keys of its window, up to its own position.
      const int64_t position = p.prefix[t.seq] + (t.first + r) / p.group;
      const int64_t seen = std::clamp<int64_t>(position + 1 - key, 0, slots);
      const int64_t unseen = std::clamp<int64_t>(p.oldest(t.seq, t.first + r) - key, 0, slots);
      for (int64_t slot = 0; slot < unseen; ++slot) scores[slot] = MASKED;
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

}  // namespace attention
}  // namespace
