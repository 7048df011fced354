// Temporary memory of one call. A few megabytes of it stay with the calling thread, so that a training step does not
// ask the system for the same pages again and again.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace lk::cpu {

class Scratch {
 public:
  // The caller asks for the same memory in two passes. The first adds up the sizes; the second, after reserve(),
  // returns the addresses.
  float* floats(i64 n) { return reinterpret_cast<float*>(take(n * static_cast<i64>(sizeof(float)))); }
  uint8_t* bytes(i64 n) { return reinterpret_cast<uint8_t*>(take(n)); }

  void reserve() {
    Pool& pool = mine();
    if (pool.size < used_) {
      std::free(pool.data);
      pool.size = 0;
      pool.data = static_cast<char*>(std::aligned_alloc(kAlign, used_));
      if (!pool.data) throw std::bad_alloc();
      pool.size = used_;
    }
    base_ = pool.data;
    used_ = 0;
  }

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    Pool& pool = mine();
    if (pool.size > kKept) {
      std::free(pool.data);
      pool = {};
    }
  }

 private:
  static constexpr size_t kAlign = 64, kKept = size_t{32} << 20;

  struct Pool {
    char* data = nullptr;
    size_t size = 0;
    ~Pool() { std::free(data); }
  };
  static Pool& mine() {
    thread_local Pool pool;
    return pool;
  }

  char* take(i64 n) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(n) + kAlign - 1) / kAlign * kAlign;
    return p;
  }

  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace lk::cpu
