// Packs weights for the other kernels: matmul.h says why.

#include <string>

#include "region.h"
#include "weights.h"

namespace {

// Packs weights [layers, outputs, inputs], of numbers of 8 or 32 bits, into [layers, panels, inputs, PANEL].
ffi::Error Pack(ffi::ThreadPool pool, Any rows, ffi::Result<Any> packed, int64_t parts) {
  const int64_t outputs = rows.dimensions()[1], inputs = rows.dimensions()[2], panels = packed->dimensions()[1];
  if (packed->dimensions()[3] != matmul::PANEL)
    return ffi::Error::InvalidArgument("packed has panels of " + std::to_string(packed->dimensions()[3]) +
                                       ", expected " + std::to_string(matmul::PANEL));
  const auto pack = [&](auto* from, auto* to) {
    divide(pool, rows.dimensions()[0] * panels, [&](Nothing&, uint64_t i) {
      matmul::pack(from + i / panels * outputs * inputs, outputs, inputs, parts, i % panels,
                   to + i * inputs * matmul::PANEL);
    });
  };
  if (ffi::ByteWidth(rows.element_type()) == 1)
    pack(static_cast<const uint8_t*>(rows.untyped_data()), static_cast<uint8_t*>(packed->untyped_data()));
  else
    pack(static_cast<const uint32_t*>(rows.untyped_data()), static_cast<uint32_t*>(packed->untyped_data()));
  return ffi::Error::Success();
}

}  // namespace

// Outputs of a panel, for who packs weights.
extern "C" const int tokenzero_panel = matmul::PANEL;

XLA_FFI_DEFINE_HANDLER_SYMBOL(tokenzero_pack, Pack,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Ret<Any>().Attr<int64_t>("parts"));
