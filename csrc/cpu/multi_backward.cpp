#include "grid.h"
#include "isa.h"
#include "multi.h"
#include "multi_tasks.h"
#include "parts.h"

namespace lk::cpu {
namespace {

constexpr i64 kDepth = 1024;     // columns of dy per step of a pass for g alone
constexpr i64 kPackRows = 128;   // rows of b [N, R] per task that packs them
constexpr i64 kPackCols = 512;   // columns of a or b^T per task that packs them
constexpr i64 kRowsInPlace = 4;  // up to this many rows of dx, a is read where it lies

// An adapter's backward, as the stages of run_all. What it needs, and the parts of its sums, are those of backward.cpp.
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
        a_packed_(dx_ && !(!l_.pairs && o.a.dtype == DType::f32 && (o.M <= kRowsInPlace || !aliased(o.a.ld)))),
        b_packed_(need_g_ && !(o.transposed && (l_.pairs ? o.b.ld % 2 == 0 : o.b.dtype == DType::f32))),
        h_packed_(o.db && (l_.pairs || o.h.dtype != DType::f32)),
        ldk_(panel_stride(call.K)),
        ldn_(panel_stride(call.N)),
        pack_a_(make_grid(o.R, call.K, o.R, kPackCols)),
        pack_b_(o.transposed ? make_grid(o.R, call.N, o.R, kPackCols) : make_grid(call.N, o.R, kPackRows, o.R)),
        rows_(make_grid(o.M, o.R, kTileRows, o.R)),
        over_n_(fused_grid(o.M, call.N, o.R)),
        over_k_(fused_grid(o.M, call.K, o.R)),
        g_parts_(one_pass_ ? over_n_.C : 1) {}

  double operations() const {
    const i64 over_n = (need_g_ ? call_.N : 0) + (o_.db ? call_.N : 0),
              over_k = (dx_ ? call_.K : 0) + (o_.da ? call_.K : 0);
    return lk::cpu::operations(o_, over_n + over_k);
  }
  void take(Memory& memory) {
    a_panel_ = memory.floats(a_packed_ ? o_.R * ldk_ : 0);
    b_panel_ = memory.floats(b_packed_ ? o_.R * ldn_ : 0);
    h32_ = memory.floats(h_packed_ ? o_.M * o_.R : 0);
    g_ = memory.floats(need_g_ ? g_parts_ * o_.M * o_.R : 0);
    g_rows_ = memory.floats(dx_ ? o_.M * o_.R : 0);
    db_part_ = memory.floats(o_.db ? over_n_.S * o_.R * ldn_ : 0);
    da_part_ = memory.floats(o_.da ? over_k_.S * o_.R * ldk_ : 0);
  }
  void room(Memory& memory) const { Room(*this, memory); }

  i64 tasks(int stage) const {
    switch (stage) {
      case 0:
        return (a_packed_ ? pack_a_.size() : 0) + (b_packed_ ? pack_b_.size() : 0) + (h_packed_ ? rows_.size() : 0);
      case 1:
        return g_tasks() + (o_.db || (need_g_ && one_pass_) ? over_n_.size() : 0);
      case 2:
        return (need_g_ ? rows_.size() : 0) + (o_.db ? ceil_div(call_.N, kReduce) : 0);
      case 3:
        return need_g_ ? over_k_.size() : 0;
      default:
        return o_.da ? ceil_div(call_.K, kReduce) : 0;
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
    Room(const Backward& w, Memory& memory) {
      const i64 n = std::min(w.o_.M, kTileRows), over_k = w.over_k_.chunk;
      bits = memory.bytes(w.o_.dropout.threshold ? n * over_k / 8 : 0);
      x = memory.bytes(copy_bytes(n, std::max({over_k, w.over_n_.chunk, w.g_tasks() ? kDepth : 0})));
      dx = memory.bytes(w.dx_ ? copy_bytes(n, over_k) : 0);
    }
  };

  void pack(i64 t) const {
    if (a_packed_ && t < pack_a_.size()) {
      const i64 k0 = pack_a_.k0(t);
      return l_.expand_panel(o_.a.at(0, k0), o_.R, pack_a_.width(t), {a_panel_ + k0, ldk_});
    }
    if (a_packed_) t -= pack_a_.size();
    if (b_packed_ && t < pack_b_.size()) {
      const i64 n0 = o_.transposed ? pack_b_.k0(t) : pack_b_.m0(t);
      const Sums panel{b_panel_ + l_.dot_column(n0), ldn_};
      if (o_.transposed) return l_.dot_panel(o_.b.at(0, n0), o_.R, pack_b_.width(t), panel);
      return l_.dot_panel_t(o_.b.at(n0, 0), pack_b_.rows(t), o_.R, panel);
    }
    if (b_packed_) t -= pack_b_.size();
    l_.outer_rows(o_.h.at(rows_.m0(t), 0), rows_.rows(t), o_.R, 1.0f, h32_ + rows_.m0(t) * o_.R);
  }

  Panel b_panel(i64 n0) const {
    if (b_packed_) return {b_panel_ + l_.dot_column(n0), ldn_};
    return {static_cast<const float*>(o_.b.at(0, n0).data), l_.pairs ? o_.b.ld / 2 : o_.b.ld};
  }

  // g = dy b for some rows, not yet scaled, where the rank is large
  void dot_dy(i64 t, const Room& room) const {
    const i64 m0 = rows_.m0(t), n = rows_.rows(t);
    for (i64 n0 = 0; n0 < call_.N; n0 += kDepth) {
      const i64 width = std::min(kDepth, call_.N - n0);
      const RowsOf dy(call_.dy, o_.rows + m0, n, n0, width, room.x);
      l_.dot(dy.tile, kKeepAll, b_panel(n0), {n, width, o_.R}, {g_ + m0 * o_.R, o_.R}, n0 > 0);
    }
  }

  // A part of g (one for each chunk of columns), and of db (one for each slab of rows).
  void pass_over_dy(i64 t, const Room& room) const {
    const i64 R = o_.R, n0 = over_n_.k0(t), width = over_n_.width(t), first = over_n_.m0(t),
              last = first + over_n_.rows(t);
    const Panel H = h_packed_ ? Panel{h32_, R} : Panel{static_cast<const float*>(o_.h.data), o_.h.ld};
    const Sums D{o_.db ? db_part_ + t / over_n_.C * R * ldn_ + n0 : nullptr, ldn_};
    if (o_.db) clear(D, R, width);
    for (i64 m0 = first; m0 < last; m0 += kTileRows) {
      const i64 n = std::min(kTileRows, last - m0);
      const RowsOf dy(call_.dy, o_.rows + m0, n, n0, width, room.x);
      if (need_g_ && one_pass_)
        l_.dot(dy.tile, kKeepAll, b_panel(n0), {n, width, R}, {g_ + (t % over_n_.C * o_.M + m0) * R, R}, false);
      if (o_.db) l_.outer(dy.tile, kKeepAll, H.at(m0, 0), {n, width, R}, D);
    }
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
    sum_rows(db_part_ + n0, width, ldn_, over_n_.S);
    kernels().write_t({db_part_ + n0, ldn_}, o_.R, width, o_.scale, o_.db.at(n0, 0));
  }

  // dx for some rows and columns, and a part of da (one for each slab of rows): the keep bits serve both
  void pass_over_x(i64 t, const Room& room) const {
    const i64 R = o_.R, k0 = over_k_.k0(t), width = over_k_.width(t), first = over_k_.m0(t),
              last = first + over_k_.rows(t);
    const Sums D{o_.da ? da_part_ + t / over_k_.C * R * ldk_ + k0 : nullptr, ldk_};
    if (o_.da) clear(D, R, width);
    for (i64 m0 = first; m0 < last; m0 += kTileRows) {
      const i64 n = std::min(kTileRows, last - m0);
      const int32_t* const rows = o_.rows + m0;
      const uint32_t threshold = o_.dropout.threshold;
      const Keep keep{threshold ? room.bits : nullptr, over_k_.chunk / 8};
      if (threshold) kernels().keep_bits(o_.dropout.seed, threshold, m0, k0, n, width, room.bits, keep.ld);
      if (o_.da) {
        const RowsOf x(call_.x, rows, n, k0, width, room.x);
        l_.outer(x.tile, keep, {g_ + m0 * R, R}, {n, width, R}, D);
      }
      if (dx_) {
        const RowsOf dx(call_.dx, rows, n, k0, width, room.dx);
        const Panel a =
            a_packed_ ? Panel{a_panel_ + k0, ldk_} : Panel{static_cast<const float*>(o_.a.data) + k0, o_.a.ld};
        l_.expand(dx.tile, keep, nullptr, {g_rows_ + m0 * R, R}, a, {n, width, R});
        dx.put_back();
      }
    }
  }

  void sum_da(i64 t) const {
    const i64 k0 = t * kReduce, width = std::min(kReduce, call_.K - k0);
    sum_rows(da_part_ + k0, width, ldk_, over_k_.S);
    kernels().write({da_part_ + k0, ldk_}, o_.R, width, o_.dropout.rescale(), o_.da.at(0, k0));
  }

  // Add `parts` matrices [R, ld] to the first of them, in their order, over `width` columns.
  void sum_rows(float* part, i64 width, i64 ld, i64 parts) const {
    for (i64 r = 0; r < o_.R; ++r) sum_parts(part + r * ld, width, part + r * ld, o_.R * ld, parts);
  }

  const Owned& o_;
  const Shared& call_;
  const bool dx_;
  const LowRank& l_;
  const bool need_g_, one_pass_, a_packed_, b_packed_, h_packed_;
  const i64 ldk_, ldn_;
  const Grid pack_a_, pack_b_, rows_, over_n_, over_k_;
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
