// A run of decoder layers of a step on CPUs as one call from XLA, and the logits as another. A layer: norm,
// query/key/value product, rotation, keys and values into their pages, attention, output product, norm, and gate and up
// products with SiLU and down product, or those of each token's experts (experts.h). The plain reference is
// model/decoder.py over the reference of attention.
//
// One parallel region runs all of it, so threads meet between phases and nowhere else, and only the batch's real tokens
// are looked at. Weights are packed, and may be quantised (matmul.h); every sum of a token has one order of addition, whatever else the batch
// holds.

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "region.h"
#include "rows.h"
#include "weights.h"

namespace {

constexpr int64_t FEW_TOKENS = 4;  // whose norms and rotations take less time than another thread needs to join

// One layer's weights; what the model lacks is null.
struct Layer {
  const float* attn_norm;
  matmul::Weight qkv;
  const float *qkv_bias, *q_norm, *k_norm;
  matmul::Weight out;
  const float *out_bias, *mlp_norm;
  matmul::Weight gate_up;  // this and down: with experts, of those that are shared
  const float* gate_up_bias;
  matmul::Weight down;
  const float* down_bias;
  experts::Weights experts;
  int64_t window;  // and sinks: as in attention::Problem
  const float* sinks;
};

struct Step {
  int64_t tokens, embed, ffn, kv_heads, group, dim, page_size, pages, seqs, width;
  int64_t pairs;  // of each head that rotate
  float eps;
  const int32_t *starts, *prefix, *table;  // as in attention::Problem
  const float *cos, *sin;                  // [tokens, pairs]
  float* x;                                // [tokens, embed]: the residual stream

  int64_t heads() const { return kv_heads * group; }
  int64_t qkv_size() const { return kv_heads * (group + 2) * dim; }
};

// What a thread needs for any phase.
struct Scratch {
  attention::Scratch attention;
  matmul::Scratch matmul;
  Room gated;  // [a block of tokens, ffn]
  Room rows;   // [a block of an expert's tokens, embed]
};

// Few tokens: all threads work on the same tokens, one operation after the other, and share its panels.
struct Together {
  Region<Scratch>& region;
  int64_t threads, tokens, ffn;
  float* gated;  // [tokens, ffn]

  float* gated_of(int64_t token) const { return gated + token * ffn; }

  template <typename Run>
  void each(const Run& run) const {
    constexpr int64_t SHARE = 8;
    if (tokens <= FEW_TOKENS) {
      for (int64_t token = 0; token < tokens; ++token) run(token);
      return;
    }
    region.run((tokens + SHARE - 1) / SHARE, [&](Scratch&, uint64_t i) {
      const int64_t first = i * SHARE, last = std::min(first + SHARE, tokens);
      for (int64_t token = first; token < last; ++token) run(token);
    });
  }

  template <typename Put>
  void product(const matmul::Product& product, int64_t outputs, const Put& put) const {
    const int64_t panels = matmul::panels(outputs), shares = std::min(panels, TASKS_PER_THREAD * threads);
    region.run(shares, [&](Scratch& scratch, uint64_t i) {
      multiply(product, 0, tokens, panels * i / shares, panels * (i + 1) / shares, scratch.matmul, put);
    });
  }
};

// Many tokens: a thread takes a block of them through all operations, so that they stay in its second level of cache.
struct Apart {
  int64_t first, last, ffn;
  Scratch& scratch;

  float* gated_of(int64_t token) const { return scratch.gated.begin + (token - first) * ffn; }

  template <typename Run>
  void each(const Run& run) const {
    for (int64_t token = first; token < last; ++token) run(token);
  }

  template <typename Put>
  void product(const matmul::Product& product, int64_t outputs, const Put& put) const {
    multiply(product, first, last, 0, matmul::panels(outputs), scratch.matmul, put);
  }
};

// Runs one batch through any layer.
class Decoder {
 public:
  Decoder(ffi::ThreadPool& pool, const Step& step, attention::Problem problem, const experts::Config& config,
          int64_t expert_ffn)
      : s(step),
        config(config),
        threads(threads_of(pool)),
        blocks(s.tokens / LEAST_BLOCK >= TASKS_PER_THREAD * threads ? blocks_of(s.tokens, threads) : 1),
        normed(s.tokens * s.embed),
        qkv(s.tokens * s.qkv_size()),
        queries(s.tokens * s.heads() * s.dim),
        attended(s.tokens * s.heads() * s.dim),
        gated(blocks == 1 ? s.tokens * s.ffn : 0),
        pairs(config, config.count ? s.tokens : 0, s.embed, expert_ffn),
        problem(problem),
        region(pool, threads - 1) {
    this->problem.q = queries.begin;
    this->problem.out = attended.begin;
  }

  // One layer, whose pages are `k` and `v`, [pages, kv_heads, page_size] rows.
  void layer(const Layer& w, char* k, char* v) {
    by_block([&](const auto& tokens) { before_attention(tokens, w, k, v); });
    problem.k = k;
    problem.v = v;
    problem.sinks = w.sinks;
    Plan& plan = plan_of(w.window);
    region.run(plan.tasks.size(), [&](Scratch& scratch, uint64_t i) {
      attention::attend(problem, plan.tasks[i], scratch.attention, plan.partials);
    });
    by_block([&](const auto& tokens) { after_attention(tokens, w); });
    if (!config.count) return;
    pairs.run(normed.begin, w.experts, s.x, region, threads);
    if (w.gate_up.values) by_block([&](const auto& tokens) { feed_forward(tokens, w); });
  }

 private:
  // What attention does in the layers that have this window.
  struct Plan {
    int64_t window;
    std::vector<attention::Task> tasks;
    std::vector<attention::Partial> partials;
  };

  Plan& plan_of(int64_t window) {
    problem.window = window;
    for (Plan& plan : plans)
      if (plan.window == window) return plan;
    auto tasks = attention::tasks_of(problem);
    auto partials = attention::partials_of(tasks);
    plans.push_back({window, std::move(tasks), std::move(partials)});
    return plans.back();
  }

  static constexpr int64_t LEAST_BLOCK = 64;  // tokens for which it pays to read all weights of a layer

  // About as many blocks for each thread, none larger than one of a product.
  static int64_t blocks_of(int64_t tokens, int64_t threads) {
    const int64_t least = (tokens + matmul::BLOCK - 1) / matmul::BLOCK, round = TASKS_PER_THREAD * threads;
    return (least + round - 1) / round * round;
  }

  // Calls `run` with the tokens together, or apart in blocks.
  template <typename Run>
  void by_block(const Run& run) {
    if (blocks == 1) return run(Together{region, threads, s.tokens, s.ffn, gated.begin});
    region.run(blocks, [&](Scratch& scratch, uint64_t i) {
      const int64_t first = s.tokens * i / blocks, last = s.tokens * (i + 1) / blocks;
      scratch.gated.reserve((last - first) * s.ffn);
      run(Apart{first, last, s.ffn, scratch});
    });
  }

  template <typename Tokens>
  void before_attention(const Tokens& tokens, const Layer& w, char* k, char* v) {
    norms(tokens, w.attn_norm);
    tokens.product({normed.begin, s.embed, w.qkv, s.embed}, s.qkv_size(), [&](int64_t token, int64_t panel, float* sums) {
      const int64_t at = panel * matmul::PANEL;
      add_bias(w.qkv_bias, panel, sums);
      write(sums, qkv.begin + token * s.qkv_size() + at, s.qkv_size() - at);
    });
    tokens.each([&](int64_t token) { place(w, token, k, v); });
  }

  template <typename Tokens>
  void after_attention(const Tokens& tokens, const Layer& w) {
    const int64_t attended_size = s.heads() * s.dim;
    project(tokens, {attended.begin, attended_size, w.out, attended_size}, w.out_bias);
    norms(tokens, w.mlp_norm);
    if (config.count)
      choose_experts(tokens, w.experts);
    else
      feed_forward(tokens, w);
  }

  template <typename Tokens>
  void choose_experts(const Tokens& tokens, const experts::Weights& w) {
    tokens.product({normed.begin, s.embed, w.router, s.embed}, config.count, [&](int64_t token, int64_t panel, float* sums) {
      const int64_t at = panel * matmul::PANEL;
      write(sums, pairs.scores.begin + token * config.count + at, config.count - at);
    });
    tokens.each([&](int64_t token) {
      const int64_t first = token * config.per_token;
      experts::Chooser().choose(config, w, pairs.scores.begin + token * config.count, pairs.chosen.data() + first,
                                pairs.weights.begin + first);
    });
  }

  template <typename Tokens>
  void feed_forward(const Tokens& tokens, const Layer& w) {
    tokens.product({normed.begin, s.embed, w.gate_up, s.embed}, 2 * s.ffn, [&](int64_t token, int64_t panel, float* sums) {
      constexpr int64_t HALF = matmul::PANEL / 2;
      const int64_t at = panel * HALF;
      add_bias(w.gate_up_bias, panel, sums);
      for (int64_t i = 0; i < HALF; i += LANES) store(sums + i, silu(load(sums + i)) * load(sums + HALF + i));
      write(sums, tokens.gated_of(token) + at, std::min(HALF, s.ffn - at));
    });
    project(tokens, {tokens.gated_of(0), s.ffn, w.down, s.ffn}, w.down_bias);
  }

  template <typename Tokens>
  void norms(const Tokens& tokens, const float* weight) {
    tokens.each([&](int64_t token) {
      norm(s.x + token * s.embed, weight, s.eps, s.embed, normed.begin + token * s.embed);
    });
  }

  // Queries, keys and values of one token: normed if the model does that, rotated, and put where attention reads them.
  void place(const Layer& w, int64_t token, char* k, char* v) {
    const int64_t seq = std::upper_bound(s.starts, s.starts + s.seqs + 1, static_cast<int32_t>(token)) - s.starts - 1;
    const int64_t position = s.prefix[seq] + token - s.starts[seq];
    const int64_t page = s.table[seq * s.width + position / s.page_size];
    const float *cos = s.cos + token * s.pairs, *sin = s.sin + token * s.pairs;
    float* from = qkv.begin + token * s.qkv_size();
    for (int64_t head = 0; head < s.kv_heads; ++head, from += (s.group + 2) * s.dim) {
      for (int64_t i = 0; i < s.group; ++i) {
        float* query = from + i * s.dim;
        if (w.q_norm) norm(query, w.q_norm, s.eps, s.dim, query);
        rotate(query, cos, sin, s.pairs, s.dim, queries.begin + ((token * s.kv_heads + head) * s.group + i) * s.dim);
      }
      if (page < 0 || page >= s.pages) continue;
      float *key = from + s.group * s.dim, *value = key + s.dim;
      const int64_t row = (page * s.kv_heads + head) * s.page_size + position % s.page_size;
      const int64_t at = row * kv::bytes_of(problem.kind, s.dim);
      if (w.k_norm) norm(key, w.k_norm, s.eps, s.dim, key);
      const bool in_place = problem.kind == kv::Rows::FLOAT32;
      float* rotated = in_place ? reinterpret_cast<float*>(k + at) : from;  // over a query that was rotated already
      rotate(key, cos, sin, s.pairs, s.dim, rotated);
      if (!in_place) kv::encode(problem.kind, rotated, s.dim, k + at);
      kv::encode(problem.kind, value, s.dim, v + at);
    }
  }

  // Adds a product, and a bias, to the residual stream.
  template <typename Tokens>
  void project(const Tokens& tokens, const matmul::Product& product, const float* bias) {
    tokens.product(product, s.embed, [&](int64_t token, int64_t panel, float* sums) {
      const int64_t at = panel * matmul::PANEL, count = std::min<int64_t>(matmul::PANEL, s.embed - at);
      float* to = s.x + token * s.embed + at;
      add_bias(bias, panel, sums);
      for (int64_t i = 0; i < count; ++i) to[i] += sums[i];
    });
  }

  const Step s;
  const experts::Config config;  // without experts, their count is 0
  const int64_t threads;
  const int64_t blocks;  // in which the tokens go through all but attention; 1: together
  // Of all tokens: [tokens, embed], [tokens, kv_heads, group + 2, dim], [tokens, kv_heads, group, dim] twice,
  // [tokens, ffn].
  Room normed, qkv, queries, attended, gated;
  experts::Pairs pairs;
  attention::Problem problem;
  std::vector<Plan> plans;
  Region<Scratch> region;  // last, so that it is closed before what its threads read is gone
};

ffi::Error Layers(ffi::ThreadPool pool, F32 x, Any k, Any v, F32 cos, F32 sin, S32 starts, S32 prefix, S32 table,
                  S32 windows,
                  F32 attn_norm, Any qkv, F32 qkv_bias, F32 q_norm, F32 k_norm, Any out,
                  F32 out_bias, F32 mlp_norm, Any gate_up, F32 gate_up_bias, Any down,
                  F32 down_bias, F32 router, F32 router_bias, F32 correction, Any experts_gate_up,
                  F32 experts_gate_up_bias, Any experts_down, F32 experts_down_bias, F32 sinks,
                  F32 qkv_scales, F32 qkv_offsets, F32 out_scales, F32 out_offsets, F32 gate_up_scales,
                  F32 gate_up_offsets, F32 down_scales, F32 down_offsets, F32 experts_gate_up_scales,
                  F32 experts_gate_up_offsets, F32 experts_down_scales, F32 experts_down_offsets,
                  ffi::ResultBuffer<ffi::F32> x_out, ffi::Result<Any> k_out,
                  ffi::Result<Any> v_out, float eps, int64_t first, int64_t experts, int64_t per_token,
                  int64_t groups, int64_t chosen_groups, bool sigmoid, bool renormalize, float scaling, float factor,
                  float limit, int64_t heads, int64_t ffn, int64_t expert_ffn, ffi::Span<const int64_t> quantised) {
  kv::Rows kind;
  if (!kv::known(k.element_type(), kind)) return ffi::Error::InvalidArgument("k is neither F32, S8 nor U8");
  const auto shape = k.dimensions();  // [layers, pages, kv_heads, page_size, row]
  const int64_t layers = attn_norm.dimensions()[0], kv_heads = shape[2], page_size = shape[3];
  const int64_t seqs = prefix.dimensions()[0], embed = x.dimensions()[1], dim = kv::dim_of(kind, shape[4]);
  const auto keep = [](void* to, const void* from, size_t size) {
    if (from != to) std::memcpy(to, from, size);  // XLA gives them the same memory, unless it must not
  };
  keep(x_out->typed_data(), x.typed_data(), x.size_bytes());
  keep(k_out->untyped_data(), k.untyped_data(), k.size_bytes());
  keep(v_out->untyped_data(), v.untyped_data(), v.size_bytes());
  const Step step = {starts.typed_data()[seqs], embed, ffn, kv_heads, heads / kv_heads, dim, page_size,
                     shape[1], seqs, table.dimensions()[1], cos.dimensions()[1], eps, starts.typed_data(),
                     prefix.typed_data(), table.typed_data(), cos.typed_data(), sin.typed_data(), x_out->typed_data()};
  if (!step.tokens) return ffi::Error::Success();
  const attention::Problem problem = {nullptr, nullptr, nullptr, step.starts, step.prefix, step.table, nullptr,
                                      step.tokens, kv_heads, step.group, dim, step.pages, page_size, seqs, step.width,
                                      0, nullptr, kind};
  const experts::Config config = {experts, per_token, groups, chosen_groups, sigmoid, renormalize, scaling, factor, limit};
  Decoder decoder(pool, step, problem, config, expert_ffn);
  const Matrix m[] = {{qkv, qkv_scales, qkv_offsets, quantised[0]},
                      {out, out_scales, out_offsets, quantised[1]},
                      {gate_up, gate_up_scales, gate_up_offsets, quantised[2]},
                      {down, down_scales, down_offsets, quantised[3]},
                      {experts_gate_up, experts_gate_up_scales, experts_gate_up_offsets, quantised[4]},
                      {experts_down, experts_down_scales, experts_down_offsets, quantised[5]}};
  const int64_t pages = k.size_bytes() / shape[0];
  for (int64_t i = 0; i < layers; ++i)
    decoder.layer({of_layer(attn_norm, i), m[0].of(i), of_layer(qkv_bias, i), of_layer(q_norm, i),
                   of_layer(k_norm, i), m[1].of(i), of_layer(out_bias, i), of_layer(mlp_norm, i),
                   m[2].of(i), of_layer(gate_up_bias, i), m[3].of(i), of_layer(down_bias, i),
                   {{of_layer(router, i)}, of_layer(router_bias, i), of_layer(correction, i), m[4].of(i),
                    of_layer(experts_gate_up_bias, i), m[5].of(i), of_layer(experts_down_bias, i)},
                   windows.typed_data()[i], of_layer(sinks, i)},
                  static_cast<char*>(k_out->untyped_data()) + (first + i) * pages,
                  static_cast<char*>(v_out->untyped_data()) + (first + i) * pages);
  return ffi::Error::Success();
}

// Logits of the tokens `indices`: norm, then the product with the packed head. Equal indices at the end are padding.
ffi::Error Head(ffi::ThreadPool pool, F32 x, S32 indices, F32 weight, Any head, F32 scales, F32 offsets,
                ffi::ResultBuffer<ffi::F32> logits, float eps, int64_t group) {
  const int64_t embed = x.dimensions()[1], rows = indices.dimensions()[0], vocab = logits->dimensions()[1];
  const int32_t* tokens = indices.typed_data();
  int64_t count = rows;
  while (count > 1 && tokens[count - 1] == tokens[count - 2]) --count;
  const Room normed(count * embed);
  for (int64_t row = 0; row < count; ++row)
    norm(x.typed_data() + tokens[row] * embed, weight.typed_data(), eps, embed, normed.begin + row * embed);
  float* to = logits->typed_data();
  Region<Scratch> region(pool, threads_of(pool) - 1);
  const Together together = {region, threads_of(pool), count, 0, nullptr};
  const matmul::Weight logits_of = {head.untyped_data(), Matrix{head, scales, offsets, group}.bits(), group,
                              of_layer(scales, 0), of_layer(offsets, 0)};
  together.product({normed.begin, embed, logits_of, embed}, vocab, [&](int64_t row, int64_t panel, float* sums) {
    const int64_t at = panel * matmul::PANEL;
    write(sums, to + row * vocab + at, vocab - at);
  });
  for (int64_t row = count; row < rows; ++row)
    std::memcpy(to + row * vocab, to + (count - 1) * vocab, vocab * sizeof(float));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tokenzero_layers, Layers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<Any>().Arg<Any>().Arg<F32>().Arg<F32>()
                                  .Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>()
                                  .Arg<F32>().Arg<Any>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<Any>()
                                  .Arg<F32>().Arg<F32>().Arg<Any>().Arg<F32>().Arg<Any>().Arg<F32>()
                                  .Arg<F32>().Arg<F32>().Arg<F32>().Arg<Any>().Arg<F32>().Arg<Any>().Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<Any>().Ret<Any>()
                                  .Attr<float>("eps").Attr<int64_t>("first").Attr<int64_t>("experts")
                                  .Attr<int64_t>("per_token").Attr<int64_t>("groups").Attr<int64_t>("chosen_groups")
                                  .Attr<bool>("sigmoid").Attr<bool>("renormalize").Attr<float>("scaling")
                                  .Attr<float>("factor").Attr<float>("limit").Attr<int64_t>("heads")
                                  .Attr<int64_t>("ffn").Attr<int64_t>("expert_ffn")
                                  .Attr<ffi::Span<const int64_t>>("quantised"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tokenzero_head, Head,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<S32>().Arg<F32>().Arg<Any>().Arg<F32>().Arg<F32>().Ret<F32>()
        .Attr<float>("eps").Attr<int64_t>("group"));
