// A mixture of experts over packed weights: the router's choice, and the products of each expert with its tokens alone.
// The plain reference is model/experts.py.
//
// Pairs of a token and one of its experts are sorted by expert, so that an expert's weights are read once for a block of
// its tokens, and those of an expert that no token chose are not read. What a token gets is added up in the order of its
// choice, whatever else the batch holds.

#pragma once

#include <cmath>
#include <vector>

#include "region.h"
#include "rows.h"

namespace {
namespace experts {

// How many there are, and how a token's are chosen; as model.config.ExpertsConfig.
struct Config {
  int64_t count, per_token, groups, chosen_groups;
  bool sigmoid, renormalize;
  float scaling, factor, limit;  // factor and limit of gpt-oss' SwiGLU; a factor of 0 is the plain one
};

// One layer's weights, those of an expert after those of the one before; what the model lacks is null.
struct Weights {
  matmul::Weight router;
  const float *router_bias, *correction;
  matmul::Weight gate_up;
  const float* gate_up_bias;
  matmul::Weight down;
  const float* down_bias;
};

// Pairs [first, last) in the order of experts, which have one expert, and at most as many as a block of a product.
struct Segment {
  int64_t expert, first, last;
};

// Gate and up of a panel, half each, as the units that go into `down`: SiLU(gate) * up, or gpt-oss' variant.
inline void activate(const Config& c, float* sums) {
  constexpr int HALF = matmul::PANEL / 2;
  for (int i = 0; i < HALF; i += LANES) {
    Vec gate = load(sums + i), up = load(sums + HALF + i);
    if (c.factor != 0.0f) {
      const Vec limit = all(c.limit);
      gate = gate < limit ? gate : limit;
      up = up < limit ? up : limit;
      up = (up > -limit ? up : -limit) + 1.0f;
      store(sums + i, silu(gate * c.factor) * (1.0f / c.factor) * up);
    } else {
      store(sums + i, silu(gate) * up);
    }
  }
}

// The `count` largest of the numbers, in order; of equal ones, the first. `taken` [numbers] is scratch.
inline void largest(const float* numbers, int64_t size, int64_t count, std::vector<char>& taken, int32_t* found) {
  taken.assign(size, 0);
  for (int64_t n = 0; n < count; ++n) {
    int64_t best = -1;
    for (int64_t i = 0; i < size; ++i)
      if (!taken[i] && (best < 0 || numbers[i] > numbers[best])) best = i;
    taken[best] = 1;
    found[n] = static_cast<int32_t>(best);
  }
}

// Chooses the experts of one token after the other.
class Chooser {
 public:
  // The experts of one token and their weights, from the router's logits [count], which become scores.
  void choose(const Config& c, const Weights& w, float* scores, int32_t* chosen, float* weights) {
    if (w.router_bias)
      for (int64_t i = 0; i < c.count; ++i) scores[i] += w.router_bias[i];
    ranked.assign(scores, scores + c.count);
    if (c.sigmoid) {
      for (int64_t i = 0; i < c.count; ++i) ranked[i] = scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    } else {
      const float peak = *std::max_element(scores, scores + c.count);
      float total = 0.0f;
      for (int64_t i = 0; i < c.count; ++i) total += scores[i] = std::exp(scores[i] - peak);
      for (int64_t i = 0; i < c.count; ++i) scores[i] /= total;
    }
    if (w.correction)
      for (int64_t i = 0; i < c.count; ++i) ranked[i] = scores[i] + w.correction[i];
    if (c.groups > 1) limit_to_groups(c);
    largest(ranked.data(), c.count, c.per_token, taken, chosen);
    float total = 0.0f;
    for (int64_t n = 0; n < c.per_token; ++n) total += weights[n] = scores[chosen[n]];
    const float scale = c.renormalize ? c.scaling / (c.sigmoid ? total + 1e-20f : total) : c.scaling;
    for (int64_t n = 0; n < c.per_token; ++n) weights[n] *= scale;
  }

 private:
  // Leaves the experts of the best groups alone, whose best two have the largest sums.
  void limit_to_groups(const Config& c) {
    const int64_t size = c.count / c.groups;
    best.resize(std::max<int64_t>(c.chosen_groups, 2));
    of_groups.resize(c.groups);
    for (int64_t g = 0; g < c.groups; ++g) {
      const float* group = ranked.data() + g * size;
      largest(group, size, std::min<int64_t>(2, size), taken, best.data());
      of_groups[g] = size > 1 ? group[best[0]] + group[best[1]] : group[best[0]];
    }
    largest(of_groups.data(), c.groups, c.chosen_groups, taken, best.data());
    for (int64_t g = 0; g < c.groups; ++g)
      if (!taken[g]) std::fill_n(ranked.begin() + g * size, size, -INFINITY);
  }

  std::vector<float> ranked, of_groups;
  std::vector<char> taken;
  std::vector<int32_t> best;
};

// The pairs of one layer and step. Some tokens at a time go through their experts: as many as give an expert about half
// a block of a product, for more would take memory and read its weights hardly less often.
class Pairs {
 public:
  Room scores, weights;         // [tokens, experts], [tokens, per_token]
  std::vector<int32_t> chosen;  // [tokens, per_token]

  Pairs(const Config& c, int64_t tokens, int64_t embed, int64_t ffn)
      : scores(tokens * c.count), weights(tokens * c.per_token), chosen(tokens * c.per_token), c(c), tokens(tokens),
        some(c.count ? std::min(tokens, std::max(LEAST, c.count * matmul::BLOCK / 2 / c.per_token)) : 0), embed(embed),
        ffn(ffn), made(some * c.per_token * embed), gated(some * c.per_token * ffn), order(some * c.per_token) {}

  // Adds what its experts make of each token's row of `x`, [tokens, embed], to its row of `to`, by weight.
  template <typename Region>
  void run(const float* x, const Weights& w, float* to, Region& region, int64_t threads) {
    for (int64_t first = 0; first < tokens; first += some) {
      const int64_t count = std::min(some, tokens - first);
      multiply_some(x, w, first, count, region, threads);
      region.run((count + SHARE - 1) / SHARE, [&](auto&, uint64_t i) {
        for (int64_t token = i * SHARE; token < std::min<int64_t>((i + 1) * SHARE, count); ++token)
          add(token, to + (first + token) * embed);
      });
    }
  }

 private:
  static constexpr int64_t LEAST = 256;  // tokens that go through their experts together
  static constexpr int64_t SHARE = 8;    // tokens of a task that adds up

  // Writes what each expert makes of its tokens among `count` from the `first` one on, by weight, to `made`.
  template <typename Region>
  void multiply_some(const float* x, const Weights& w, int64_t first, int64_t count, Region& region, int64_t threads) {
    sort(first, count);
    const int64_t up_size = matmul::panels(2 * ffn), down_size = matmul::panels(embed);
    in_shares(region, threads, up_size, [&](auto& scratch, const Segment& s, int64_t from, int64_t to) {
      gate_and_up(x, w, s, from, to, scratch);
    });
    in_shares(region, threads, down_size, [&](auto& scratch, const Segment& s, int64_t from, int64_t to) {
      down(w, s, from, to, scratch);
    });
  }

  // Adds up what a token's experts have made of it, in the order of its choice, so that it is the same in any batch.
  void add(int64_t token, float* to) const {
    const float* from = made.begin + token * c.per_token * embed;
    for (int64_t i = 0; i < embed; ++i) {
      float sum = from[i];
      for (int64_t n = 1; n < c.per_token; ++n) sum += from[n * embed + i];
      to[i] += sum;
    }
  }

  // Sorts the pairs of some tokens by expert, and divides those of each into segments of about the same size.
  void sort(int64_t first, int64_t count) {
    begin = first * c.per_token;
    std::vector<int64_t> ends(c.count + 1);
    for (int64_t pair = 0; pair < count * c.per_token; ++pair) ++ends[chosen[begin + pair] + 1];
    for (int64_t expert = 0; expert < c.count; ++expert) ends[expert + 1] += ends[expert];
    segments.clear();
    for (int64_t expert = 0; expert < c.count; ++expert) {
      const int64_t size = ends[expert + 1] - ends[expert], parts = (size + matmul::BLOCK - 1) / matmul::BLOCK;
      for (int64_t i = 0; i < parts; ++i)
        segments.push_back({expert, ends[expert] + size * i / parts, ends[expert] + size * (i + 1) / parts});
    }
    // The largest first, so that no thread is left with one at the end.
    std::stable_sort(segments.begin(), segments.end(),
                     [](const Segment& a, const Segment& b) { return a.last - a.first > b.last - b.first; });
    for (int64_t pair = 0; pair < count * c.per_token; ++pair)
      order[ends[chosen[begin + pair]]++] = static_cast<int32_t>(pair);
  }

  // Calls `run` for every segment, and for shares of its panels where there are too few segments for the threads.
  template <typename Region, typename Run>
  void in_shares(Region& region, int64_t threads, int64_t panels, const Run& run) {
    const int64_t count = segments.size(), wanted = TASKS_PER_THREAD * threads;
    const int64_t shares = std::min(panels, std::max<int64_t>(1, (wanted + count - 1) / count));
    region.run(count * shares, [&](auto& scratch, uint64_t i) {
      const int64_t share = i % shares;
      run(scratch, segments[i / shares], panels * share / shares, panels * (share + 1) / shares);
    });
  }

  template <typename Scratch>
  void gate_and_up(const float* x, const Weights& w, const Segment& s, int64_t from, int64_t to, Scratch& scratch) {
    constexpr int64_t HALF = matmul::PANEL / 2;
    const int64_t count = s.last - s.first, panels = matmul::panels(2 * ffn);
    scratch.rows.reserve(count * embed);
    float* rows = scratch.rows.begin;
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(rows + i * embed, x + (begin + order[s.first + i]) / c.per_token * embed, embed * sizeof(float));
    const matmul::Weight weight = w.gate_up.after(s.expert * panels, embed);
    const float* bias = w.gate_up_bias ? w.gate_up_bias + s.expert * panels * matmul::PANEL : nullptr;
    multiply({rows, embed, weight, embed}, 0, count, from, to, scratch.matmul, [&](int64_t i, int64_t panel, float* sums) {
      add_bias(bias, panel, sums);
      activate(c, sums);
      write(sums, gated.begin + (s.first + i) * ffn + panel * HALF, std::min(HALF, ffn - panel * HALF));
    });
  }

  template <typename Scratch>
  void down(const Weights& w, const Segment& s, int64_t from, int64_t to, Scratch& scratch) {
    const int64_t panels = matmul::panels(embed);
    const matmul::Weight weight = w.down.after(s.expert * panels, ffn);
    const float* bias = w.down_bias ? w.down_bias + s.expert * panels * matmul::PANEL : nullptr;
    multiply({gated.begin, ffn, weight, ffn}, s.first, s.last, from, to, scratch.matmul,
             [&](int64_t at, int64_t panel, float* sums) {
               const Vec by = all(weights.begin[begin + order[at]]);
               add_bias(bias, panel, sums);
               for (int i = 0; i < matmul::PANEL; i += LANES) store(sums + i, load(sums + i) * by);
               write(sums, made.begin + order[at] * embed + panel * matmul::PANEL, embed - panel * matmul::PANEL);
             });
  }

  const Config c;
  const int64_t tokens, some, embed, ffn;  // of all tokens, how many go through their experts at a time
  int64_t begin = 0;           // the number of these tokens' first pair, token * per_token + which of the token's
  Room made;                   // [some tokens, per_token, embed]
  Room gated;                  // [pairs in the order of experts, ffn]
  std::vector<int32_t> order;  // the number of each pair, counted from `begin`
  std::vector<Segment> segments;
};

}  // namespace experts
}  // namespace
