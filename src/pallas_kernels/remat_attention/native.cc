// Attention of a few queries over keys that are rebuilt from stored rows, on CPU, called through XLA's foreign function
// interface.
//
// Rows of a tile of tokens are dequantised once for all kv heads that share them. Then, for each of these, its keys are
// rebuilt into the cache of the core, turned by RoPE, used by all query rows under an online softmax, and forgotten.
// Work is split over (sequence, part of the tokens) and taken by whichever thread is free.

#include <cmath>
#include <numeric>
#include <vector>

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kTokens = 6;  // whose sums a product holds in registers
constexpr int kInner = 64;  // channels of rows at a time: their weights stay in the first-level cache

// out += x w for n rows of x, over its channels [from, until).
template <int kRows>
void multiply_rows(const float* x, int64_t stride, int n, const float* w, int from, int until, int64_t width,
                   float* out) {
  int i = 0;
  for (; i + kRows <= n; i += kRows)
    weigh_all<kRows>(x + i * stride, int(stride), w, from, until, width, out + i * width);
  if constexpr (kRows > 1)
    if (i < n) multiply_rows<kRows / 2>(x + i * stride, stride, n - i, w, from, until, width, out + i * width);
}

// out += x w, [n, inner] times [inner, width]; rows of out and w have `width` floats, those of x `stride`.
void multiply(const float* x, int64_t stride, int n, const float* w, int inner, int64_t width, float* out) {
  for (int from = 0; from < inner; from += kInner)
    multiply_rows<kTokens>(x, stride, n, w, from, std::min(from + kInner, inner), width, out);
}

// The weights that turn rows of a group into keys of its heads, see weights.Rebuild.
struct Rebuild {
  Floats up;    // [K, r, dk]
  Floats bias;  // [K, dk]
  const float *norm, *cos, *sin;  // norm null: none
  float eps;
  int64_t head_dim, width, dk;

  Rebuild(const float* weights, const float* biases, const float* norm, const float* cos, const float* sin, float eps,
          int64_t heads, int64_t groups, int64_t head_dim, int64_t width)
      : norm(norm), cos(cos), sin(sin), eps(eps), head_dim(head_dim), width(width), dk(round_up(head_dim, kLanes)) {
    const int64_t per = heads / groups;
    up.resize(heads * width * dk), bias.resize(heads * dk);
    for (int64_t h = 0; h < heads; ++h) {
      std::copy_n(biases + h * head_dim, head_dim, &bias[h * dk]);
      for (int64_t c = 0; c < width; ++c)
        std::copy_n(weights + ((h / per * width + c) * per + h % per) * head_dim, head_dim, &up[(h * width + c) * dk]);
    }
  }

  // Keys of one head, in rows of dk, for n tokens from `token` on, whose rows are `stride` apart.
  void keys(int64_t head, int64_t token, int n, const float* rows, int64_t stride, float* k) const {
    for (int i = 0; i < n; ++i)
      for (int64_t d = 0; d < dk; d += kLanes) store(k + i * dk + d, load(&bias[head * dk + d]));
    multiply(rows, stride, n, &up[head * width * dk], int(width), dk, k);
    for (int i = 0; i < n; ++i) {
      if (norm) normalize(k + i * dk);
      rotate(k + i * dk, cos + (token + i) * head_dim, sin + (token + i) * head_dim);
    }
  }

 private:
  void normalize(float* k) const {
    float total = 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) total += k[d] * k[d];
    const float factor = 1.0f / std::sqrt(total / head_dim + eps);
    for (int64_t d = 0; d < head_dim; ++d) k[d] *= factor * norm[d];
  }

  // Both halves of a row of the tables are the same: one is read.
  void rotate(float* k, const float* c, const float* s) const {
    const int64_t half = head_dim / 2;
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) {
      const Vec low = load(k + d), high = load(k + half + d);
      store(k + d, low * load(c + d) - high * load(s + d));
      store(k + half + d, high * load(c + d) + low * load(s + d));
    }
    for (; d < half; ++d) {
      const float low = k[d], high = k[half + d];
      k[d] = low * c[d] - high * s[d];
      k[half + d] = high * c[d] + low * s[d];
    }
  }
};

// Tiles of a tensor as floats: as they lie in memory where they can be read so, or else in a buffer.
class Reader {
 public:
  Reader(const Tensor& t, int tile) : t_(t), tile_(tile), padded_(round_up(t.channels, kLanes)) {
    if (in_place()) return;
    rows_.resize(tile * padded_);
    scratch_.resize(scratch_size(t, tile, padded_));
  }

  int64_t stride() const { return padded_; }

  // The row of the tile's first token; only those that are seen are there.
  const float* read(int64_t head, const Tile& t) {
    if (in_place()) return t_.exact32 + (head * t_.tokens + t.start) * t_.channels;
    read_tile(t_, head, t.start, t.from, t.until, tile_, padded_, rows_.data(), scratch_.data());
    return rows_.data();
  }

 private:
  bool in_place() const { return t_.exact32 && padded_ == t_.channels; }

  const Tensor& t_;
  const int tile_;
  const int64_t padded_;
  Floats rows_, scratch_;
};

// All heads of a sequence together: they share the tables of RoPE, and those of a group their rows.
template <int kRows>
void attend(const Problem& pr, const Rebuild& rebuild, bool shared, int64_t groups, int64_t b, int64_t begin,
            int64_t end, int tile, Part* parts, int64_t stride) {
  const int64_t per = pr.kv_heads / groups;
  std::vector<Rows<kRows>> heads;
  heads.reserve(pr.kv_heads);
  for (int64_t h = 0; h < pr.kv_heads; ++h) heads.emplace_back(pr, b, h, tile, parts[h * stride]);
  Reader keys(pr.keys, tile), values(pr.values, tile);
  Floats k(tile * rebuild.dk);
  each_tile(pr, b, begin, end, tile, [&](const Tile& t) {
    for (int64_t g = 0; g < groups; ++g) {
      const float* const rows = keys.read(b * groups + g, t);
      for (int64_t h = g * per; h < (g + 1) * per; ++h) {
        rebuild.keys(h, t.start + t.from, t.until - t.from, rows + t.from * keys.stride(), keys.stride(),
                     &k[t.from * rebuild.dk]);
        heads[h].scores(k.data());
        heads[h].weights(t);
      }
      const float* const own = shared ? rows : values.read(b * groups + g, t);
      for (int64_t h = g * per; h < (g + 1) * per; ++h) heads[h].add(own);
    }
  });
}

ffi::Error remat_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> start,
                           ffi::Buffer<ffi::S32> stop, ffi::Buffer<ffi::F32> up, ffi::Buffer<ffi::F32> cos,
                           ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> norm,
                           ffi::RemainingArgs tensors, ffi::ResultBuffer<ffi::F32> output,
                           ffi::ResultBuffer<ffi::F32> lse, ffi::Span<const int64_t> keys,
                           ffi::Span<const int64_t> values, int64_t shared, int64_t kv_heads, int64_t first,
                           int64_t window, float scale, float eps) {
  size_t at = 0;
  auto k = read_tensor(tensors, at, keys);
  if (!k.has_value()) return k.error();
  auto v = k;
  if (!shared) v = read_tensor(tensors, at, values);
  if (!v.has_value()) return v.error();
  const auto dims = q.dimensions();
  const Problem pr{q.typed_data(), start.typed_data(), stop.typed_data(), *k, *v, dims[0], dims[1], dims[2], dims[3],
                   kv_heads, first, window, scale, output->typed_data(), lse->typed_data()};
  const int64_t groups = up.dimensions()[0];
  const Rebuild rebuild(up.typed_data(), bias.typed_data(), norm.element_count() ? norm.typed_data() : nullptr,
                        cos.typed_data(), sin.typed_data(), eps, kv_heads, groups, pr.head_dim, k->channels);
  const int tile = int(round_up(64, std::lcm(kLanes, std::max(k->pack, v->pack))));
  attend_parts(pool, pr, 1, tile, 1, [&](int64_t b, int64_t, int64_t begin, int64_t end, Part* parts, int64_t stride) {
    by_rows(pr.rows(), [&](auto rows) {
      attend<rows>(pr, rebuild, shared, groups, b, begin, end, tile, parts, stride);
    });
  });
  return ffi::Error::Success();
}

// Adds deltas times `up` to the rows of an accumulator [B, S, M], in place, below `until`.
ffi::Error reconstruct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> below, ffi::Buffer<ffi::F32> up,
                       ffi::Buffer<ffi::S32> until, ffi::RemainingArgs tensors, ffi::ResultBuffer<ffi::F32> acc,
                       ffi::Span<const int64_t> form) {
  size_t at = 0;
  auto delta = read_tensor(tensors, at, form);
  if (!delta.has_value()) return delta.error();
  if (below.untyped_data() != acc->untyped_data())
    return ffi::Error(ffi::ErrorCode::kInternal, "expected an accumulator that is changed in place");
  const auto dims = acc->dimensions();
  const int64_t tokens = dims[1], width = dims[2];
  const int tile = int(round_up(64, std::lcm(kLanes, delta->pack)));
  const int64_t tiles = (delta->tokens + tile - 1) / tile;
  parallel(pool, dims[0] * tiles, [&](int64_t i) {
    const int64_t b = i / tiles, start = i % tiles * tile;
    const int n = int(std::clamp<int64_t>(until.typed_data()[b] - start, 0, tile));
    if (n == 0) return;
    Reader rows(*delta, tile);
    multiply(rows.read(b, {start, 0, n}), rows.stride(), n, up.typed_data(), int(delta->channels), width,
             acc->typed_data() + (b * tokens + start) * width);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pallas_kernels_remat_attention, remat_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("keys")
                                  .Attr<ffi::Span<const int64_t>>("values")
                                  .Attr<int64_t>("shared")
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(pallas_kernels_reconstruct, reconstruct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("delta"));
