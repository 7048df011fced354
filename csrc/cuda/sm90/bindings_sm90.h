// The sm_90a part of lora_kernels._cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace lk::sm90 {

void bind_sm90(pybind11::module_& m);

}  // namespace lk::sm90
