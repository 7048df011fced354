// The choice between the compiled instruction sets: by default the best one that both the processor and the operating
// system support.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lk::cpu {

// An instruction set that the kernels are written for.
struct Path {
  const char* name;
  bool processor;        // whether the processor and the operating system support it
  const Kernels* table;  // null where the compiler could not compile it

  bool usable() const { return processor && table; }
};

const std::vector<Path>& paths();           // of this architecture, best first
std::vector<std::string> available_isas();  // the usable ones, best first
const Kernels& kernels();                   // the table in use
bool choose_isa(const std::string& name);   // false if this machine cannot run it

}  // namespace lk::cpu
