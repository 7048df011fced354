#include "grid.h"
#include "isa.h"
#include "multi.h"
#include "multi_tasks.h"

namespace lk::cpu {
namespace {

constexpr i64 kDepth = 1024;     // columns of x and a per product: 8 rows of a stay in L1
constexpr i64 kRanks = 8;        // rows of a per product
constexpr i64 kRows = 48;        // rows of x or y per task
constexpr i64 kWidth = 4096;     // columns of y per task, and where the adapter has one block of rows:
constexpr i64 kFewWidth = 1024;  // columns of y per task
constexpr i64 kBlock = 1 << 14;  // floats of a copied block of y, or of a packed block of b^T: they stay in L2
constexpr i64 kRowsInPlace = 4;  // up to this many rows, a b^T is read in place however its rows lie

// An adapter's forward, as the stages of run_all. Every element of h and y is summed within one task.
class Forward {
 public:
  static constexpr int kStages = 3;  // pack b; h; y

  Forward(const Owned& o, const Shared& call, int threads)
      : o_(o),
        call_(call),
        bias_(static_cast<const float*>(o.bias      ? o.bias.data
                                        : call.base ? nullptr
                                                    : call.bias.data)),
        l_(kernels().low_rank(call.x.dtype, o.a.dtype)),
        in_place_(o.transposed && !l_.pairs && o.b.dtype == DType::f32 && (few() || !aliased(o.b.ld))),
        ldn_(panel_stride(call.N)),
        block_(std::clamp<i64>(kBlock / std::max<i64>({most(), o.R, 1}) / 64 * 64, 64, kWidth)),
        pack_(make_grid(call.N, o.R, 128, o.R)),
        of_h_(make_grid(o.M, o.R, std::clamp<i64>(round_up(ceil_div(o.M, 4 * threads), 6), 6, kRows), ranks())),
        of_y_(make_grid(o.M, call.N, kRows, o.M <= kRows ? kFewWidth : kWidth)) {}

  double operations() const { return lk::cpu::operations(o_, call_.K + call_.N); }
  void take(Memory& memory) {
    h_ = memory.floats(o_.M * o_.R);
    panel_ = memory.floats(packed() ? o_.R * ldn_ : 0);
  }
  void room(Memory& memory) const {
    Memory of_h, of_y;
    RoomOfH(*this, of_h);
    RoomOfY(*this, of_y);
    memory.bytes(std::max(of_h.used(), of_y.used()));
  }
  i64 tasks(int stage) const {
    if (stage == 0) return packed() ? pack_.size() : 0;
    if (stage == 1) return o_.R ? of_h_.size() : 0;
    return of_y_.size();
  }
  void run(int stage, i64 t, uint8_t* room) const {
    if (stage == 0)
      pack(t);
    else if (stage == 1)
      dot_x(t, room);
    else
      add_to_y(t, room);
  }

 private:
  bool few() const { return o_.M <= kRowsInPlace; }
  // Whether b is packed as a whole before it is used. Else each task packs what it needs, unless it reads b^T in place.
  bool packed() const { return !o_.transposed && o_.M > kRows; }
  i64 most() const { return std::min(o_.M, kRows); }  // rows of a task
  // With dropout the keep bits of a tile serve all ranks.
  i64 ranks() const {
    return o_.M > kRows || o_.dropout.threshold ? std::max<i64>(o_.R, 1) : few() ? kRanks : 2 * kRanks;
  }
  bool a_in_place() const { return l_.pairs ? o_.a.ld % 2 == 0 : o_.a.dtype == DType::f32; }

  struct RoomOfH {
    uint8_t *bits, *x;
    float* a;
    RoomOfH(const Forward& w, Memory& memory)
        : bits(memory.bytes(w.o_.dropout.threshold ? w.most() * kDepth / 8 : 0)),
          x(memory.bytes(copy_bytes(w.most(), kDepth))),
          a(memory.floats(w.a_in_place() ? 0 : kRanks * panel_stride(kDepth))) {}
  };
  struct RoomOfY {
    float *h, *b;
    uint8_t* y;
    RoomOfY(const Forward& w, Memory& memory)
        : h(memory.floats(w.most() * w.o_.R)),
          b(memory.floats(w.packed() || w.in_place_ ? 0 : w.o_.R * panel_stride(w.block_))),
          y(memory.bytes(copy_bytes(w.most(), w.block_))) {}
  };

  void pack(i64 t) const {
    const i64 n0 = pack_.m0(t);
    l_.expand_panel_t(o_.b.at(n0, 0), pack_.rows(t), o_.R, {panel_ + n0, ldn_});
  }

  // h = keep(x) a^T for some rows and ranks, not yet scaled
  void dot_x(i64 t, uint8_t* memory) const {
    Memory pieces(memory);
    const RoomOfH room(*this, pieces);
    const i64 m0 = of_h_.m0(t), n = of_h_.rows(t), first = of_h_.k0(t), last = first + of_h_.width(t);
    const uint32_t threshold = o_.dropout.threshold;
    const Keep keep{threshold ? room.bits : nullptr, kDepth / 8};
    i64 k0 = 0;
    do {
      const i64 depth = std::min(kDepth, call_.K - k0);
      const RowsOf x(call_.x, o_.rows + m0, n, k0, depth, room.x);
      if (threshold)
        kernels().keep_bits(o_.dropout.seed, threshold, o_.mask_row + m0, k0, n, depth, room.bits, keep.ld);
      for (i64 r0 = first; r0 < last; r0 += kRanks) {
        const i64 some = std::min(kRanks, last - r0);
        l_.dot(x.tile, keep, a_panel(r0, k0, some, depth, room.a), {n, depth, some}, {h_ + m0 * o_.R + r0, o_.R},
               k0 > 0);
      }
      k0 += depth;
    } while (k0 < call_.K);
  }

  Panel a_panel(i64 r0, i64 k0, i64 some, i64 depth, float* room) const {
    const Tile a = o_.a.at(r0, k0);
    if (a_in_place()) return {static_cast<const float*>(a.data), l_.pairs ? a.ld / 2 : a.ld};
    const Sums packed{room, panel_stride(kDepth)};
    l_.dot_panel(a, some, depth, packed);
    return packed;
  }

  // y += s h b^T for some rows and columns, and the bias unless the base product has it
  void add_to_y(i64 t, uint8_t* memory) const {
    Memory pieces(memory);
    const RoomOfY room(*this, pieces);
    const i64 m0 = of_y_.m0(t), n = of_y_.rows(t), first = of_y_.k0(t), last = first + of_y_.width(t);
    const Panel h{h_ + m0 * o_.R, o_.R};
    const float c = o_.dropout.rescale();
    if (o_.h && !first) kernels().write(h, n, o_.R, c, o_.h.at(m0, 0));
    l_.expand_rows({h_ + m0 * o_.R, o_.R, DType::f32}, n, o_.R, c * o_.scale, room.h);
    const int32_t* const rows = o_.rows + m0;
    const bool whole = (packed() || in_place_) && even_step(rows, n);
    for (i64 n0 = first; n0 < last; n0 += block_) {
      const i64 cols = whole ? last - first : std::min(block_, last - n0);
      const RowsOf y(call_.y, rows, n, n0, cols, room.y);
      l_.expand(y.tile, kKeepAll, bias_ ? bias_ + n0 : nullptr, {room.h, o_.R}, b_panel(n0, cols, room.b),
                {n, cols, o_.R});
      y.put_back();
      if (whole) break;
    }
  }

  Panel b_panel(i64 n0, i64 cols, float* room) const {
    if (!o_.R) return {nullptr, 0};
    if (packed()) return {panel_ + n0, ldn_};
    if (in_place_) return {static_cast<const float*>(o_.b.data) + n0, o_.b.ld};
    const Sums block{room, panel_stride(block_)};
    if (o_.transposed)
      l_.expand_panel(o_.b.at(0, n0), o_.R, cols, block);
    else
      l_.expand_panel_t(o_.b.at(n0, 0), cols, o_.R, block);
    return block;
  }

  const Owned& o_;
  const Shared& call_;
  const float* const bias_;
  const LowRank& l_;
  const bool in_place_;  // b^T is read where it lies
  const i64 ldn_, block_;
  const Grid pack_, of_h_, of_y_;
  float *h_ = nullptr, *panel_ = nullptr;
};

}  // namespace

void forward_multi(int threads, const Shared& call, const std::vector<Owned>& adapters) {
  double products = call.base ? static_cast<double>(call.N) * call.K * kReading : 0;
  for (const Owned& o : adapters) products += operations(o, call.K + call.N);
  threads = team(threads, 2.0 * products);
  std::vector<Forward> works;
  works.reserve(adapters.size());
  for (const Owned& o : adapters) works.emplace_back(o, call, threads);
  run_all(threads, works, call.base.get(), call.bias, call.N);
}

}  // namespace lk::cpu
