// The choice between the compiled instruction sets: by default the best one that both the processor and the operating
// system support.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lk::cpu {

std::vector<std::string> available_isas();  // best first
const Kernels& kernels();                   // the table in use
bool choose_isa(const std::string& name);   // false if this machine cannot run it

}  // namespace lk::cpu
