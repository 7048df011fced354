// Which of the compiled instruction sets runs: the best one that both the processor and the operating system support.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lk::cpu {

std::vector<std::string> available_isas();  // best first
const Kernels& kernels();                   // the chosen one
bool choose_isa(const std::string& name);   // false if this machine cannot run it
}  // namespace lk::cpu
