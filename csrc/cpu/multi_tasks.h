// How the adapters of a call are shared out among threads.
//
// The work of an adapter consists of stages, and a stage of tasks that are independent of each other. A large adapter
// is computed by all threads together, with a barrier after each stage. A small one is computed by one thread from its
// first stage to its last, in memory that the thread uses again for the next one: so its operands stay in a cache, and
// the memory of a call does not grow with the number of adapters. Tasks are the same in both cases, and so are results.
#pragma once

#include <algorithm>
#include <vector>

#include "few.h"
#include "grid.h"
#include "scratch.h"

namespace lk::cpu {

// Memory that is handed out in pieces. Without an address it only adds up their sizes.
class Memory {
 public:
  explicit Memory(uint8_t* base = nullptr) : base_(base) {}
  uint8_t* bytes(i64 n) {
    uint8_t* const piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(n, 64);
    return piece;
  }
  float* floats(i64 n) { return reinterpret_cast<float*>(bytes(n * static_cast<i64>(sizeof(float)))); }
  i64 used() const { return used_; }

 private:
  uint8_t* base_;
  i64 used_ = 0;
};

constexpr double kLarge = 0.25;  // an adapter with more than this part of a thread's share of the work is large

// Compute all works, beside the strips of the base product, which the first stage does not read. The class Work has
//   kStages                the number of its stages
//   operations()           its size
//   take(Memory&)          asks for the memory of the adapter
//   room(Memory&)          asks for the memory of a thread
//   tasks(stage)           the number of tasks
//   run(stage, task, room) computes one of them; `room` begins the memory of the calling thread
template <class Work>
void run_all(int threads, std::vector<Work>& works, FewRows* base, const Tile& bias, i64 N) {
  double total = 0;
  std::vector<Work*> order;
  order.reserve(works.size());
  for (Work& w : works) {
    order.push_back(&w);
    total += w.operations();
  }
  size_t large = 0;
  if (threads > 1) {
    std::stable_sort(order.begin(), order.end(), [](Work* a, Work* b) { return a->operations() > b->operations(); });
    while (large < order.size() && order[large]->operations() * threads > kLarge * total) ++large;
  }
  i64 together = 0, alone = 0, room = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    Memory count, of_thread;
    order[i]->take(count);
    order[i]->room(of_thread);
    if (i < large)
      together += count.used();
    else
      alone = std::max(alone, count.used());
    room = std::max(room, of_thread.used());
  }

  Scratch scratch;
  uint8_t *shared, *mine;
  float* bias32;
  const bool convert = base && bias && bias.dtype != DType::f32;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) scratch.reserve();
    shared = scratch.bytes(together);
    mine = scratch.bytes(threads * (alone + room));
    bias32 = scratch.floats(convert ? N : 0);
    if (base) base->take(scratch, threads);
  }
  if (convert) kernels().read(bias, 1, N, 1.0f, {bias32, N});
  const float* const added = convert ? bias32 : static_cast<const float*>(bias.data);
  if (base) base->arrange();
  Memory memory(shared);
  for (size_t i = 0; i < large; ++i) order[i]->take(memory);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    uint8_t* const own = mine + worker() * (alone + room);
    if (base) {
#pragma omp for schedule(dynamic, 1) nowait
      for (i64 t = 0; t < base->strips(); ++t) base->strip(t, added);
    }
    for (int stage = 0; stage < Work::kStages; ++stage) {
      if (!large && stage) break;
      for (size_t i = 0; i < large; ++i) {
        const i64 tasks = order[i]->tasks(stage);
#pragma omp for schedule(dynamic, 1) nowait
        for (i64 t = 0; t < tasks; ++t) order[i]->run(stage, t, own + alone);
      }
#pragma omp barrier
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = large; i < order.size(); ++i) {
      Memory memory(own);
      order[i]->take(memory);
      for (int stage = 0; stage < Work::kStages; ++stage)
        for (i64 t = 0; t < order[i]->tasks(stage); ++t) order[i]->run(stage, t, own + alone);
    }
  }
}

}  // namespace lk::cpu
