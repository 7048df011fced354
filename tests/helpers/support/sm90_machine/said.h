// The message of a check, in memory that outlives the call, so that Python can read it.
#pragma once

#include <string>

namespace {

std::string said;

const char* say(const std::string& what) {
  said = what;
  return said.c_str();
}

}  // namespace
