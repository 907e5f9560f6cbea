// What this build holds, for maskaccel._native.
#include <string>

#include "isa.h"
#include "stable.h"

#ifndef MASKACCEL_CUDA_ARCH_LIST
#define MASKACCEL_CUDA_ARCH_LIST ""
#endif

namespace {

void info(StableIValue* stack, uint64_t, uint64_t) {
  std::string text = "isa=";
  text += maskaccel::isa_name(maskaccel::isa());
  text += ";cuda_archs=" MASKACCEL_CUDA_ARCH_LIST;
  stack[0] = torch::stable::detail::from(text);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(maskaccel_raw, m) { m.def("_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(maskaccel_raw, CompositeImplicitAutograd, m) { m.impl("_info", info); }
