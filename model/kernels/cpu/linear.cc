// Matrix products of few tokens on CPUs, as a call from XLA: each weight is read from memory once, in order, for all
// tokens. A matrix library packs the weights before it multiplies, which pays only for many tokens.
//
// The inputs lie across the lanes of the vectors. A micro-kernel holds the sums of a few outputs for a few tokens. Each
// sum is added up in the same order for any number of tokens, so a token's result does not depend on the rest of the
// batch.

#include <vector>

#include "common.h"

namespace ffi = xla::ffi;

namespace {

constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int TOKENS = LANES == 16 ? 8 : 4;  // of one micro-kernel
constexpr int64_t TASK_WEIGHTS = 1 << 15;    // of a task, at least: fewer are done before another thread has started
constexpr int64_t NEAR_WEIGHTS = 1 << 12;    // of a block that stays in the first level of cache for all tokens

// Outputs of a micro-kernel for so many tokens: their sums, the weights and an input fit in registers.
constexpr int outputs_of(int tokens) { return std::clamp((REGISTERS - 2) / (tokens + 1), 1, 4); }

struct Problem {
  const float* x;       // groups of TOKENS tokens, the last one smaller, each [inputs / LANES, tokens, LANES]
  const float* weight;  // [outputs, inputs]
  float* out;           // [tokens, outputs]
  int64_t tokens, inputs, outputs;
};

// Outputs [o, o + O) of the T tokens from t on.
template <int T, int O>
inline void tile(const Problem& p, int64_t t, int64_t o) {
  const float *x = p.x + t * p.inputs, *w = p.weight + o * p.inputs;
  constexpr int ROOM = (O * T + LANES - 1) / LANES * LANES;
  Vec sums[ROOM] = {};
  for (int64_t i = 0; i < p.inputs; i += LANES, x += T * LANES) {
    Vec weights[O];
    for (int r = 0; r < O; ++r) {
      weights[r] = load(w + r * p.inputs + i);
      __builtin_prefetch(w + (O + r) * p.inputs + i);  // of the next outputs
    }
    for (int s = 0; s < T; ++s) {
      const Vec input = load(x + s * LANES);
      for (int r = 0; r < O; ++r) sums[s * O + r] = fma(weights[r], input, sums[s * O + r]);
    }
  }
  float results[ROOM];
  for (int i = 0; i < ROOM; i += LANES) store(results + i, sums_of(sums + i));
  for (int s = 0; s < T; ++s)
    for (int r = 0; r < O; ++r) p.out[(t + s) * p.outputs + o + r] = results[s * O + r];
}

// Outputs [first, last) of the `count` tokens from t on, at most T.
template <int T>
void some(const Problem& p, int64_t t, int64_t count, int64_t first, int64_t last) {
  if constexpr (T > 1)
    if (count < T) return some<T - 1>(p, t, count, first, last);
  constexpr int O = outputs_of(T);
  int64_t o = first;
  for (; o + O <= last; o += O) tile<T, O>(p, t, o);
  for (; o < last; ++o) tile<T, 1>(p, t, o);
}

ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight,
                  ffi::ResultBuffer<ffi::F32> out) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1], outputs = weight.dimensions()[0];
  std::vector<float> packed(tokens * inputs);
  for (int64_t t = 0; t < tokens; t += TOKENS) {
    const int64_t count = std::min<int64_t>(tokens - t, TOKENS);
    float* to = packed.data() + t * inputs;
    for (int64_t i = 0; i < inputs; i += LANES)
      for (int64_t s = 0; s < count; ++s, to += LANES) store(to, load(x.typed_data() + (t + s) * inputs + i));
  }
  const Problem p = {packed.data(), weight.typed_data(), out->typed_data(), tokens, inputs, outputs};
  const int64_t most = TASKS_PER_THREAD * threads_of(pool);
  const int64_t wanted = std::clamp<int64_t>(inputs * outputs / TASK_WEIGHTS, 1, most);
  constexpr int64_t WHOLE = 12;  // outputs: a multiple of any micro-kernel's
  const int64_t step = (outputs + wanted * WHOLE - 1) / (wanted * WHOLE) * WHOLE;
  const int64_t near = std::max<int64_t>(NEAR_WEIGHTS / inputs / WHOLE, 1) * WHOLE;
  divide(pool, (outputs + step - 1) / step, [=](Nothing&, size_t i) {
    const int64_t end = std::min<int64_t>(outputs, (i + 1) * step);
    for (int64_t o = i * step; o < end; o += near)
      for (int64_t t = 0; t < tokens; t += TOKENS)
        some<TOKENS>(p, t, std::min<int64_t>(tokens - t, TOKENS), o, std::min(end, o + near));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tokenzero_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
