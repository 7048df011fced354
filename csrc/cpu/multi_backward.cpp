#include "grid.h"
#include "isa.h"
#include "multi.h"
#include "multi_tasks.h"
#include "parts.h"

namespace lk::cpu {
namespace {

constexpr i64 kDepth = 1024;     // columns of dy per step of a pass for g alone
constexpr i64 kPack = 256;       // columns of a or b^T per task that packs them
constexpr i64 kColumns = 512;    // columns of x per task at least, where all rows are one part
constexpr i64 kRowsInPlace = 4;  // up to this many rows of dx, a is read where it lies

// The tasks over x and dx. Where all rows are one part, the columns may be cut in any way: long rows of a and da are
// read and written faster than short ones.
Grid over_x(i64 M, i64 K, i64 R) {
  const Grid grid = fused_grid(M, K, R);
  return grid.S == 1 ? make_grid(M, K, M, std::max(grid.chunk, kColumns)) : grid;
}

// An adapter's backward, as the stages of run_all. Its sums have the parts of `fused_grid`. Where all rows are one
// part, a task packs its columns of a or b^T, and writes its columns of da or db^T: then it needs no memory of the size
// of a or b.
class Backward {
 public:
  static constexpr int kStages = 5;  // pack; over dy; sums over dy; over x and dx; sums over x

  Backward(const Owned& o, const Shared& call)
      : o_(o),
        call_(call),
        dx_(call.dx),
        l_(kernels().low_rank(call.dy.dtype, o.a.dtype)),
        need_g_(dx_ || o.da),
        one_pass_(o.R <= kFusedRank),
        a_in_place_(!l_.pairs && o.a.dtype == DType::f32 && (o.M <= kRowsInPlace || !aliased(o.a.ld))),
        b_in_place_(o.transposed && (l_.pairs ? o.b.ld % 2 == 0 : o.b.dtype == DType::f32)),
        h_packed_(o.db && (l_.pairs || o.h.dtype != DType::f32)),
        ldk_(panel_stride(call.K)),
        ldn_(panel_stride(call.N)),
        rows_(make_grid(o.M, o.R, kTileRows, o.R)),
        over_n_(fused_grid(o.M, call.N, o.R)),
        over_k_(over_x(o.M, call.K, o.R)),
        pack_a_(dx_ && !a_in_place_ && over_k_.S > 1 ? ceil_div(call.K, kPack) : 0),
        pack_b_(need_g_ && !b_in_place_ && (over_n_.S > 1 || !one_pass_) ? ceil_div(call.N, kPack) : 0),
        g_parts_(one_pass_ ? over_n_.C : 1) {}

  double operations() const {
    const i64 over_n = (need_g_ ? call_.N : 0) + (o_.db ? call_.N : 0);
    const i64 over_k = (dx_ ? call_.K : 0) + (o_.da ? call_.K : 0);
    return lk::cpu::operations(o_, over_n + over_k);
  }
  void take(Memory& memory) {
    a_panel_ = memory.floats(pack_a_ ? o_.R * ldk_ : 0);
    b_panel_ = memory.floats(pack_b_ ? o_.R * ldn_ : 0);
    h32_ = memory.floats(h_packed_ ? o_.M * o_.R : 0);
    g_ = memory.floats(need_g_ ? g_parts_ * o_.M * o_.R : 0);
    g_rows_ = memory.floats(dx_ ? o_.M * o_.R : 0);
    db_part_ = memory.floats(o_.db && over_n_.S > 1 ? over_n_.S * o_.R * ldn_ : 0);
    da_part_ = memory.floats(o_.da && over_k_.S > 1 ? over_k_.S * o_.R * ldk_ : 0);
  }
  void room(Memory& memory) const { Room(*this, memory); }

  i64 tasks(int stage) const {
    switch (stage) {
      case 0:
        return pack_a_ + pack_b_ + (h_packed_ ? rows_.size() : 0);
      case 1:
        return g_tasks() + (o_.db || (need_g_ && one_pass_) ? over_n_.size() : 0);
      case 2:
        return (need_g_ ? rows_.size() : 0) + (o_.db && over_n_.S > 1 ? ceil_div(call_.N, kReduce) : 0);
      case 3:
        return need_g_ ? over_k_.size() : 0;
      default:
        return o_.da && over_k_.S > 1 ? ceil_div(call_.K, kReduce) : 0;
    }
  }
  void run(int stage, i64 t, uint8_t* memory) const {
    Memory pieces(memory);
    const Room room(*this, pieces);
    switch (stage) {
      case 0:
        return pack(t);
      case 1:
        return t < g_tasks() ? dot_dy(t, room) : pass_over_dy(t - g_tasks(), room);
      case 2:
        return need_g_ && t < rows_.size() ? sum_g(t) : sum_db(t - (need_g_ ? rows_.size() : 0));
      case 3:
        return pass_over_x(t, room);
      default:
        return sum_da(t);
    }
  }

 private:
  i64 g_tasks() const { return need_g_ && !one_pass_ ? rows_.size() : 0; }  // tasks of a pass for g alone

  struct Room {
    uint8_t *bits, *x, *dx;  // keep bits, and copies of rows of dy or x, and of dx
    float *panel, *sum;      // columns of a or b^T, packed, and of da or db^T
    Room(const Backward& w, Memory& memory) {
      const i64 n = std::min(w.o_.M, kTileRows), over_k = w.over_k_.chunk, over_n = w.over_n_.chunk;
      bits = memory.bytes(w.o_.dropout.threshold ? n * over_k / 8 : 0);
      x = memory.bytes(copy_bytes(n, std::max({over_k, over_n, w.g_tasks() ? kDepth : 0})));
      dx = memory.bytes(w.dx_ ? copy_bytes(n, over_k) : 0);
      const i64 chunk = std::max(w.over_n_.S == 1 ? over_n : 0, w.over_k_.S == 1 ? over_k : 0);
      panel = memory.floats(chunk ? w.o_.R * panel_stride(chunk) : 0);
      sum = memory.floats(chunk ? w.o_.R * panel_stride(chunk) : 0);
    }
  };

  void pack(i64 t) const {
    if (t < pack_a_) {
      const i64 k0 = t * kPack;
      return l_.expand_panel(o_.a.at(0, k0), o_.R, std::min(kPack, call_.K - k0), {a_panel_ + k0, ldk_});
    }
    t -= pack_a_;
    if (t < pack_b_) {
      const i64 n0 = t * kPack;
      return pack_b(n0, std::min(kPack, call_.N - n0), {b_panel_ + l_.dot_column(n0), ldn_});
    }
    t -= pack_b_;
    l_.outer_rows(o_.h.at(rows_.m0(t), 0), rows_.rows(t), o_.R, 1.0f, h32_ + rows_.m0(t) * o_.R);
  }

  void pack_b(i64 n0, i64 cols, Sums panel) const {
    if (o_.transposed)
      l_.dot_panel(o_.b.at(0, n0), o_.R, cols, panel);
    else
      l_.dot_panel_t(o_.b.at(n0, 0), cols, o_.R, panel);
  }

  // The columns n0.. of b^T for `dot`, and k0.. of a for `expand`. `room` has memory for them, if no stage has packed
  // all of them.
  Panel b_panel(i64 n0, i64 cols, float* room) const {
    if (b_in_place_) return {static_cast<const float*>(o_.b.at(0, n0).data), l_.pairs ? o_.b.ld / 2 : o_.b.ld};
    if (pack_b_) return {b_panel_ + l_.dot_column(n0), ldn_};
    const Sums panel{room, panel_stride(over_n_.chunk)};
    pack_b(n0, cols, panel);
    return panel;
  }
  Panel a_panel(i64 k0, i64 cols, float* room) const {
    if (a_in_place_) return {static_cast<const float*>(o_.a.data) + k0, o_.a.ld};
    if (pack_a_) return {a_panel_ + k0, ldk_};
    const Sums panel{room, panel_stride(over_k_.chunk)};
    l_.expand_panel(o_.a.at(0, k0), o_.R, cols, panel);
    return panel;
  }

  // g = dy b for some rows, not yet scaled, where the rank is large
  void dot_dy(i64 t, const Room& room) const {
    const i64 m0 = rows_.m0(t), n = rows_.rows(t);
    for (i64 n0 = 0; n0 < call_.N; n0 += kDepth) {
      const i64 width = std::min(kDepth, call_.N - n0);
      const RowsOf dy(call_.dy, o_.rows + m0, n, n0, width, room.x);
      l_.dot(dy.tile, kKeepAll, b_panel(n0, width, nullptr), {n, width, o_.R}, {g_ + m0 * o_.R, o_.R}, n0 > 0);
    }
  }

  // A part of g (one for each chunk of columns), and of db (one for each slab of rows).
  void pass_over_dy(i64 t, const Room& room) const {
    const i64 R = o_.R, n0 = over_n_.k0(t), width = over_n_.width(t), first = over_n_.m0(t),
              last = first + over_n_.rows(t);
    const bool dot = need_g_ && one_pass_, whole = over_n_.S == 1;
    const Panel H = h_packed_ ? Panel{h32_, R} : Panel{static_cast<const float*>(o_.h.data), o_.h.ld};
    const Panel b = dot ? b_panel(n0, width, room.panel) : Panel{};
    const Sums D = whole ? Sums{room.sum, panel_stride(over_n_.chunk)}
                         : Sums{o_.db ? db_part_ + t / over_n_.C * R * ldn_ + n0 : nullptr, ldn_};
    if (o_.db) clear(D, R, width);
    for (i64 m0 = first; m0 < last; m0 += kTileRows) {
      const i64 n = std::min(kTileRows, last - m0);
      const RowsOf dy(call_.dy, o_.rows + m0, n, n0, width, room.x);
      if (dot) l_.dot(dy.tile, kKeepAll, b, {n, width, R}, {g_ + (t % over_n_.C * o_.M + m0) * R, R}, false);
      if (o_.db) l_.outer(dy.tile, kKeepAll, H.at(m0, 0), {n, width, R}, D);
    }
    if (o_.db && whole) kernels().write_t(D, R, width, o_.scale, o_.db.at(n0, 0));
  }

  // Sum the parts of g, and pack it for the products of dx and da.
  void sum_g(i64 t) const {
    const i64 m0 = rows_.m0(t), n = rows_.rows(t), R = o_.R;
    float* const g = g_ + m0 * R;
    sum_parts(g, n * R, g, o_.M * R, g_parts_);
    const Tile sum{g, R, DType::f32};
    if (dx_) l_.expand_rows(sum, n, R, o_.dropout.rescale() * o_.scale, g_rows_ + m0 * R);
    if (o_.da) l_.outer_rows(sum, n, R, o_.scale, g);
  }

  void sum_db(i64 t) const {
    const i64 n0 = t * kReduce, width = std::min(kReduce, call_.N - n0);
    sum_slabs(db_part_ + n0, width, ldn_, over_n_.S);
    kernels().write_t({db_part_ + n0, ldn_}, o_.R, width, o_.scale, o_.db.at(n0, 0));
  }

  // dx for some rows and columns, and a part of da (one for each slab of rows): the keep bits serve both
  void pass_over_x(i64 t, const Room& room) const {
    const i64 R = o_.R, k0 = over_k_.k0(t), width = over_k_.width(t), first = over_k_.m0(t),
              last = first + over_k_.rows(t);
    const bool whole = over_k_.S == 1;
    const Panel a = dx_ ? a_panel(k0, width, room.panel) : Panel{};
    const Sums D = whole ? Sums{room.sum, panel_stride(over_k_.chunk)}
                         : Sums{o_.da ? da_part_ + t / over_k_.C * R * ldk_ + k0 : nullptr, ldk_};
    if (o_.da) clear(D, R, width);
    for (i64 m0 = first; m0 < last; m0 += kTileRows) {
      const i64 n = std::min(kTileRows, last - m0);
      const int32_t* const rows = o_.rows + m0;
      const uint32_t threshold = o_.dropout.threshold;
      const Keep keep{threshold ? room.bits : nullptr, over_k_.chunk / 8};
      if (threshold)
        kernels().keep_bits(o_.dropout.seed, threshold, o_.mask_row + m0, k0, n, width, room.bits, keep.ld);
      if (o_.da) {
        const RowsOf x(call_.x, rows, n, k0, width, room.x);
        l_.outer(x.tile, keep, {g_ + m0 * R, R}, {n, width, R}, D);
      }
      if (dx_) {
        const RowsOf dx(call_.dx, rows, n, k0, width, room.dx);
        l_.expand(dx.tile, keep, nullptr, {g_rows_ + m0 * R, R}, a, {n, width, R});
        dx.put_back();
      }
    }
    if (o_.da && whole) kernels().write(D, R, width, o_.dropout.rescale(), o_.da.at(0, k0));
  }

  void sum_da(i64 t) const {
    const i64 k0 = t * kReduce, width = std::min(kReduce, call_.K - k0);
    sum_slabs(da_part_ + k0, width, ldk_, over_k_.S);
    kernels().write({da_part_ + k0, ldk_}, o_.R, width, o_.dropout.rescale(), o_.da.at(0, k0));
  }

  // Add the matrices [R, ld] of all slabs to the first of them, in their order, over `width` columns.
  void sum_slabs(float* part, i64 width, i64 ld, i64 slabs) const {
    for (i64 r = 0; r < o_.R; ++r) sum_parts(part + r * ld, width, part + r * ld, o_.R * ld, slabs);
  }

  const Owned& o_;
  const Shared& call_;
  const bool dx_;
  const LowRank& l_;
  const bool need_g_, one_pass_, a_in_place_, b_in_place_, h_packed_;
  const i64 ldk_, ldn_;
  const Grid rows_, over_n_, over_k_;
  const i64 pack_a_, pack_b_;  // the number of tasks that pack all of a and b
  const i64 g_parts_;
  float *a_panel_ = nullptr, *b_panel_ = nullptr, *h32_ = nullptr, *g_ = nullptr, *g_rows_ = nullptr,
        *db_part_ = nullptr, *da_part_ = nullptr;
};

}  // namespace

void backward_multi(int threads, const Shared& call, const std::vector<Owned>& adapters) {
  std::vector<Backward> works;
  works.reserve(adapters.size());
  double products = call.base ? static_cast<double>(call.N) * call.K * kReading : 0;
  for (const Owned& o : adapters) products += works.emplace_back(o, call).operations();
  run_all(team(threads, 2.0 * products), works, call.base.get(), {}, 0);
}

}  // namespace lk::cpu
