// The weights of a run of layers as XLA passes them: arrays with a leading axis of layers, of which each has its part.

#pragma once

#include "matmul.h"

namespace {

namespace ffi = xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using Any = ffi::AnyBuffer;

// The layer's part of an array [layers, ...]; null if it is empty.
inline const float* of_layer(const F32& array, int64_t layer) {
  const int64_t size = array.element_count() / array.dimensions()[0];
  return size ? array.typed_data() + layer * size : nullptr;
}

// A matrix of each layer: its values, and the scales and offsets of a quantised one.
struct Matrix {
  const Any& values;
  const F32 &scales, &offsets;
  int64_t group;

  int bits() const { return values.element_type() == ffi::S8 ? 8 : values.element_type() == ffi::U32 ? 4 : 32; }

  // The layer's; without values if it is empty.
  matmul::Weight of(int64_t layer) const {
    const int64_t size = values.size_bytes() / values.dimensions()[0];
    return {size ? static_cast<const char*>(values.untyped_data()) + layer * size : nullptr,
            bits(), group, of_layer(scales, layer), of_layer(offsets, layer)};
  }
};

}  // namespace
