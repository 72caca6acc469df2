// Attention over the paged KV pool as a call from XLA; see attention.h.

#include <string>

#include "attention.h"
#include "region.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                          ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> starts,
                          ffi::Buffer<ffi::S32> prefix, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> window,
                          ffi::Buffer<ffi::F32> sinks,
                          ffi::ResultBuffer<ffi::F32> out) {
  const auto shape = q.dimensions(), pages = k.dimensions();
  if (*layer.typed_data() < 0 || *layer.typed_data() >= pages[0])
    return ffi::Error::InvalidArgument("layer is " + std::to_string(*layer.typed_data()) + ", the pool has " +
                                       std::to_string(pages[0]));
  if (*window.typed_data() < 1)
    return ffi::Error::InvalidArgument("window is " + std::to_string(*window.typed_data()) + ", expected at least 1");
  kv::Rows kind;
  if (!kv::known(k.element_type(), kind)) return ffi::Error::InvalidArgument("k is neither F32, S8 nor U8");
  const int64_t before = *layer.typed_data() * (k.size_bytes() / pages[0]);
  const attention::Problem p = {q.typed_data(),
                     static_cast<const char*>(k.untyped_data()) + before,
                     static_cast<const char*>(v.untyped_data()) + before,
                     starts.typed_data(),
                     prefix.typed_data(),
                     table.typed_data(),
                     out->typed_data(),
                     shape[0],
                     shape[1],
                     shape[2],
                     shape[3],
                     pages[1],
                     pages[3],
                     prefix.dimensions()[0],
                     table.dimensions()[1],
                     *window.typed_data(),
                     sinks.element_count() ? sinks.typed_data() : nullptr,
                     kind};
  // Padding is zero: later layers would turn undefined values into NaN.
  const int64_t token = p.kv_heads * p.group * p.dim;
  std::fill(p.out + p.starts[p.seqs] * token, p.out + p.tokens * token, 0.0f);

  const auto tasks = attention::tasks_of(p);
  auto partials = attention::partials_of(tasks);
  divide<attention::Scratch>(pool, tasks.size(), [&](attention::Scratch& scratch, uint64_t i) {
    attention::attend(p, tasks[i], scratch, partials);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tokenzero_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
