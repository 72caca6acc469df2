// Pages copied into the KV pool on CPUs, as a call from XLA. Its own scatter copies a few bytes at a time, on one thread.
//
// The pool is written in place: XLA hands it over under the same address as operand and as result.

#include <cstring>

#include "region.h"

namespace ffi = xla::ffi;

namespace {

// Copies page i of data, [count, k and v, layers, tile], to the places of page pages[i] in k and v,
// [layers, num_pages, tile]; a page out of range is dropped.
ffi::Error ScatterPages(ffi::ThreadPool pool, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> pages,
                        ffi::AnyBuffer data, ffi::Result<ffi::AnyBuffer> new_k, ffi::Result<ffi::AnyBuffer> new_v) {
  if (new_k->untyped_data() != k.untyped_data() || new_v->untyped_data() != v.untyped_data())
    return ffi::Error::Internal("the pool was copied, expected it in place");
  const int64_t layers = k.dimensions()[0], num_pages = k.dimensions()[1], count = pages.dimensions()[0];
  const size_t tile = layers && num_pages ? k.size_bytes() / (layers * num_pages) : 0;
  const char* from = static_cast<const char*>(data.untyped_data());
  char* const to[] = {static_cast<char*>(new_k->untyped_data()), static_cast<char*>(new_v->untyped_data())};
  const int32_t* numbers = pages.typed_data();
  divide(pool, 2 * count, [=](Nothing&, uint64_t i) {
    const int64_t page = numbers[i / 2];
    if (page < 0 || page >= num_pages) return;
    for (int64_t layer = 0; layer < layers; ++layer)
      std::memcpy(to[i % 2] + (layer * num_pages + page) * tile, from + (i * layers + layer) * tile, tile);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tokenzero_scatter_pages, ScatterPages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
