// Attention of a few queries over packed keys and values on CPU, called through XLA's foreign function interface.
//
// Tiles of tokens are unpacked into the cache of the core, used by all query rows of their kv head under an online
// softmax, and forgotten: dequantised, or as codes where the CPU has a matrix unit for them (native_amx.h). Work is
// split over (sequence, kv head, part of the tokens) and taken by whichever thread is free.

#include <numeric>
#include <optional>
#include <vector>

#include "attention.h"
#include "native_amx.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Scores of all query rows of a head with a tile of its keys, and sums of its values weighted by probabilities.
template <int kRows>
class Reader {
 public:
  Reader(const Problem& pr, Rows<kRows>& rows) : k_(pr.keys), v_(pr.values), rows_(rows) {
#ifdef PALLAS_KERNELS_AMX
    if (amx::serves_keys(k_) || amx::serves_values(v_)) unit_.emplace();
    if (amx::serves_keys(k_))
      for (int64_t r = 0; r < rows.padded; r += amx::kRows)
        keys_.emplace_back(k_, &rows.q[r * rows.dk], rows.dk, rows.tile);
    if (amx::serves_values(v_)) values_.emplace(v_, rows.tile);
    if (!keys_.empty() && values_) return;
#endif
    // One buffer for both where it can be: a tile of keys and one of values would not fit the first-level cache. What
    // values leave must not lie beside keys of fewer channels, which are read with the columns behind them.
    values_at_ = k_.channels == v_.channels ? 0 : rows.tile * rows.dk;
    tensor_.resize(values_at_ + rows.tile * std::max(rows.dk, rows.dv));
    scratch_.resize(std::max(scratch_size(k_, rows.tile, rows.dk), scratch_size(v_, rows.tile, rows.dv)));
  }

  void scores(int64_t head, const Tile& t) {
#ifdef PALLAS_KERNELS_AMX
    if (!keys_.empty()) {
      const amx::Codes codes(k_, head, t.start, t.from, t.until, codes_);
      float* s = rows_.s.data();
      for (auto& four : keys_) four.scores(head, t.start, t.from, t.until, codes, s), s += amx::kRows * rows_.tile;
      return;
    }
#endif
    read_tile(k_, head, t.start, t.from, t.until, rows_.tile, rows_.dk, tensor_.data(), scratch_.data());
    rows_.scores(tensor_.data());
  }

  void add(int64_t head, const Tile& t) {
#ifdef PALLAS_KERNELS_AMX
    if (values_) {
      values_->interleave(amx::Codes(v_, head, t.start, t.from, t.until, codes_), t.from, t.until);
      for (int64_t r = 0; r < rows_.padded; r += amx::kRows)
        values_->add(head, t.start, t.from, t.until, &rows_.s[r * rows_.tile], rows_.dv, &rows_.part.out[r * rows_.dv]);
      return;
    }
#endif
    float* const values = tensor_.data() + values_at_;
    read_tile(v_, head, t.start, t.from, t.until, rows_.tile, rows_.dv, values, scratch_.data());
    rows_.add(values);
  }

 private:
  const Tensor &k_, &v_;
  Rows<kRows>& rows_;
  int64_t values_at_ = 0;
  Floats tensor_, scratch_;
#ifdef PALLAS_KERNELS_AMX
  std::optional<amx::Unit> unit_;
  std::vector<amx::Keys> keys_;
  std::optional<amx::Values> values_;
  std::vector<amx::Line> codes_;
#endif
};

template <int kRows>
void attend(const Problem& pr, int64_t b, int64_t h, int64_t begin, int64_t end, int tile, Part& part) {
  const int64_t head = b * pr.kv_heads + h;
  Rows<kRows> rows(pr, b, h, tile, part);
  Reader<kRows> reader(pr, rows);
  each_tile(pr, b, begin, end, tile, [&](const Tile& t) {
    reader.scores(head, t);
    rows.weights(t);
    reader.add(head, t);
  });
}

ffi::Error packed_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> start,
                            ffi::Buffer<ffi::S32> stop, ffi::RemainingArgs tensors,
                            ffi::ResultBuffer<ffi::F32> output, ffi::ResultBuffer<ffi::F32> lse,
                            ffi::Span<const int64_t> keys, ffi::Span<const int64_t> values, int64_t kv_heads,
                            int64_t first, int64_t window, float scale) {
  size_t at = 0;
  auto k = read_tensor(tensors, at, keys);
  if (!k.has_value()) return k.error();
  auto v = read_tensor(tensors, at, values);
  if (!v.has_value()) return v.error();
  const auto dims = q.dimensions();
  Problem pr{q.typed_data(), start.typed_data(), stop.typed_data(), *k, *v, dims[0], dims[1], dims[2], dims[3],
             kv_heads, first, window, scale, output->typed_data(), lse->typed_data()};
  // Tokens and query rows at a time, and what tokens are a multiple of.
  int tile = 64, unit = std::lcm(kLanes, std::max(k->pack, v->pack));
  int64_t together = pr.rows();
#ifdef PALLAS_KERNELS_AMX
  if (amx::serves_keys(*k) && amx::serves_values(*v)) tile = amx::kTokens;
  if (amx::serves_keys(*k) || amx::serves_values(*v)) together = amx::kRows, unit = std::lcm(64, unit);
#endif
  tile = int(round_up(tile, unit));
  attend_parts(pool, pr, kv_heads, tile, 8, [&](int64_t b, int64_t h, int64_t begin, int64_t end, Part* part, int64_t) {
    by_rows(together, [&](auto rows) { attend<rows>(pr, b, h, begin, end, tile, *part); });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pallas_kernels_packed_attention, packed_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("keys")
                                  .Attr<ffi::Span<const int64_t>>("values")
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));
