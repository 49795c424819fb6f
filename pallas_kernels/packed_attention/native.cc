// Attention of a few queries over packed keys and values on CPU, called through XLA's foreign function interface.
//
// Tiles of tokens are unpacked into the cache of the core, used by all query rows of their kv head under an online
// softmax, and forgotten: dequantised, or as codes where the CPU has a matrix unit for them (native_amx.h). Work is
// split over (sequence, kv head, part of the tokens) and taken by whichever thread is free.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "native.h"
#include "native_amx.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr float kMasked = -1e30f;  // layout.MASKED

// e^x for x <= 0, to a few units in the last place: 2^n by its bits times a polynomial on [-ln2/2, ln2/2]. NaN stays.
inline Vec exponential(Vec x) {
  const Vec floor = splat(-87.0f);
  x = x < floor ? floor : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// The bytes of a token in one plane, and which of their bits are its codes.
struct Codes {
  const uint8_t* bytes;
  int mask;
};

inline Vec masked(const Codes& c, int64_t d) { return __builtin_convertvector(bytes_at(c.bytes + d) & c.mask, Vec); }

// to[d] = sum over planes of masked bytes * scale[plane] + zero, channels [from, until). Codes are never shifted:
// scales make up for where they stand, exactly, since they differ by powers of two. kStep is 1 for scales and zero
// points of each channel, 0 for one of all.
template <int kPlanes, int kStep>
inline void dequantize_row(float* to, const Codes* c, const float* const* scale, const float* zero, int64_t from,
                           int64_t until) {
  const auto of = [](const float* x, int64_t d) { return kStep ? load(x + d) : splat(*x); };
  int64_t d = from;
  for (; d + kLanes <= until; d += kLanes) {
    Vec x = masked(c[0], d) * of(scale[0], d) + of(zero, d);
    if (kPlanes == 2) x += masked(c[1], d) * of(scale[1], d);
    store(to + d, x);
  }
  for (; d < until; ++d) {
    float x = float(c[0].bytes[d] & c[0].mask) * scale[0][kStep * d] + zero[kStep * d];
    if (kPlanes == 2) x += float(c[1].bytes[d] & c[1].mask) * scale[1][kStep * d];
    to[d] = x;
  }
}

// Tokens [from, until) of the tile of one head that begins at token `start`, a packing block's first, as rows of
// `padded` float32 channels. Within a run of tokens, which stand in one shift of every plane, only bytes change.
template <int kPlanes>
void dequantize(const Tensor& t, int64_t head, int64_t start, int from, int until, int tile, int64_t padded, float* to,
                float* scratch) {
  const int64_t channels = t.channels, groups = t.per_channel ? 1 : channels / t.group;
  const int run = run_of(t);
  // Per token, scales of the tile, a row for each group; per channel, those of one group of tokens, a row a plane.
  float* const zero = scratch + (t.per_channel ? 2 * padded : groups * tile);
  if (!t.per_channel) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (head * groups + g) * t.tokens + start;
      widen(t.scale + at + from, until - from, scratch + g * tile + from);
      widen(t.zero + at + from, until - from, zero + g * tile + from);
    }
  }
  for (int first = from / run * run; first < until; first += run) {
    Codes codes[kPlanes];
    float factor[kPlanes];
    for (int p = 0; p < kPlanes; ++p) {
      const Place at = place(t, p, head, start + first);
      codes[p] = {at.bytes, ((1 << t.width[p]) - 1) << at.shift};
      factor[p] = std::ldexp(1.0f, (p ? t.width[0] : 0) - at.shift);
    }
    int64_t stale = 0;  // the first token whose scales per channel are not at hand
    for (int i = first; i < std::min(first + run, until); ++i) {
      if (i >= from && t.per_channel) {
        if (start + i >= stale) {
          const int64_t group = (start + i) / t.group, at = (head * (t.tokens / t.group) + group) * channels;
          widen(t.zero + at, channels, zero);
          for (int p = 0; p < kPlanes; ++p) {
            float* const scale = scratch + p * padded;
            widen(t.scale + at, channels, scale);
            for (int64_t d = 0; d < padded; d += kLanes) store(scale + d, load(scale + d) * factor[p]);
          }
          stale = (group + 1) * t.group;
        }
        const float* const scale[2] = {scratch, scratch + padded};
        dequantize_row<kPlanes, 1>(to + i * padded, codes, scale, zero, 0, channels);
      } else if (i >= from) {
        for (int64_t g = 0; g < groups; ++g) {
          float own[kPlanes];
          const float* scale[2] = {own, own + kPlanes - 1};
          for (int p = 0; p < kPlanes; ++p) own[p] = scratch[g * tile + i] * factor[p];
          dequantize_row<kPlanes, 0>(to + i * padded, codes, scale, zero + g * tile + i, g * t.group,
                                     (g + 1) * t.group);
        }
      }
      for (int p = 0; p < kPlanes; ++p) codes[p].bytes += channels;
    }
  }
}

void copy(const Tensor& t, int64_t head, int64_t start, int from, int until, int64_t padded, float* to) {
  for (int i = from; i < until; ++i) {
    const int64_t at = (head * t.tokens + start + i) * t.channels;
    float* row = to + i * padded;
    if (t.exact32) {
      std::memcpy(row, t.exact32 + at, 4 * t.channels);
    } else {
      for (int64_t d = 0; d < t.channels; ++d) {
        const uint32_t bits = uint32_t(t.exact16[at + d]) << 16;
        std::memcpy(row + d, &bits, 4);
      }
    }
  }
}

// Floats that dequantize needs beside its result.
int64_t scratch_size(const Tensor& t, int tile, int64_t padded) {
  return t.bits == 16 ? 0 : t.per_channel ? 3 * padded : 2 * (t.channels / t.group) * tile;
}

void read_tile(const Tensor& t, int64_t head, int64_t start, int from, int until, int tile, int64_t padded, float* to,
               float* scratch) {
  if (t.bits == 16) {
    copy(t, head, start, from, until, padded, to);
  } else if (t.planes == 2) {
    dequantize<2>(t, head, start, from, until, tile, padded, to, scratch);
  } else {
    dequantize<1>(t, head, start, from, until, tile, padded, to, scratch);
  }
}

// Scores of kRows query rows with n keys, n a multiple of kLanes / kRows; out has `stride` floats a row.
template <int kRows>
void scores(const float* q, const float* k, int n, int64_t padded, float* out, int stride) {
  constexpr int kKeys = kLanes / kRows;
  for (int i = 0; i < n; i += kKeys) {
    Vec acc[kLanes] = {};
    for (int64_t d = 0; d < padded; d += kLanes) {
      Vec rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = load(q + r * padded + d);
      for (int j = 0; j < kKeys; ++j) {
        const Vec key = load(k + (i + j) * padded + d);
        for (int r = 0; r < kRows; ++r) acc[r * kKeys + j] += rows[r] * key;
      }
    }
    const Vec total = sums(acc);
    for (int r = 0; r < kRows; ++r) std::memcpy(out + r * stride + i, (const float*)&total + r * kKeys, 4 * kKeys);
  }
}

// out += p v for kRows query rows over keys [from, until), kVecs vectors of channels at a time.
template <int kRows, int kVecs>
void weigh(const float* p, int stride, const float* v, int from, int until, int64_t padded, float* out) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVecs; ++c) acc[r][c] = load(out + r * padded + c * kLanes);
  for (int i = from; i < until; ++i) {
    Vec value[kVecs];
    for (int c = 0; c < kVecs; ++c) value[c] = load(v + i * padded + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float weight = p[r * stride + i];
      for (int c = 0; c < kVecs; ++c) acc[r][c] += weight * value[c];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVecs; ++c) store(out + r * padded + c * kLanes, acc[r][c]);
}

template <int kRows>
void weigh_all(const float* p, int stride, const float* v, int from, int until, int64_t padded, float* out) {
  constexpr int kVecs = kLanes / 4;  // of sums in registers: AVX2 has half as many registers
  int64_t d = 0;
  for (; d + kVecs * kLanes <= padded; d += kVecs * kLanes)
    weigh<kRows, kVecs>(p, stride, v + d, from, until, padded, out + d);
  for (; d < padded; d += kLanes) weigh<kRows, 1>(p, stride, v + d, from, until, padded, out + d);
}

// Scores [from, until) of a row become exponentials over the new maximum, 0 outside [lo, hi); `top` and `total` go on,
// and what weighted sums so far shrink by is returned.
float softmax(float* p, int from, int until, int lo, int hi, float& top, float& total) {
  IntVec lanes;
  for (int j = 0; j < kLanes; ++j) lanes[j] = j;
  Vec tops = splat(top), sum = {};
  for (int i = from / kLanes * kLanes; i < until; i += kLanes) {
    const Vec x = load(p + i);
    tops = ((lanes + i >= lo) & (lanes + i < hi) & (x > tops)) ? x : tops;
  }
  float best = tops[0];
  for (int j = 1; j < kLanes; ++j) best = std::max(best, tops[j]);
  for (int i = from / kLanes * kLanes; i < until; i += kLanes) {
    const Vec x = ((lanes + i >= lo) & (lanes + i < hi)) ? exponential(load(p + i) - best) : Vec{};
    store(p + i, x);
    sum += x;
  }
  const float shrink = best == top ? 1.0f : std::exp(top - best);
  Vec all[kLanes] = {sum};
  total = total * shrink + sums(all)[0];
  top = best;
  return shrink;
}

struct Problem {
  const float* q;  // [B, T, H, D]
  const int32_t *start, *stop;
  Tensor keys, values;
  int64_t batch, queries, heads, kv_heads, first, window;  // window 0: none
  float scale;
  float *output, *lse;

  int64_t rows() const { return queries * (heads / kv_heads); }
  int64_t at(int64_t b, int64_t h, int64_t row) const {  // of a row in [B, T, H]
    const int64_t per = heads / kv_heads;
    return (b * queries + row / per) * heads + h * per + row % per;
  }
};

// Tokens of a tile that a query row sees.
struct Seen {
  int from, until;
};

// What one part of the tokens gives a head: unnormalised outputs, maxima and sums.
struct Part {
  std::vector<float> out, top, total;
};

// Scores of all query rows of a head with a tile of its keys, and sums of its values weighted by probabilities.
template <int kRows>
class Reader {
 public:
  Reader(const Problem& pr, const float* q, int64_t rows, int tile)
      : k_(pr.keys), v_(pr.values), q_(q), rows_(rows), tile_(tile), dk_(round_up(k_.channels, kLanes)),
        dv_(round_up(v_.channels, kLanes)) {
#ifdef PALLAS_KERNELS_AMX
    if (amx::serves_keys(k_) || amx::serves_values(v_)) unit_.emplace();
    if (amx::serves_keys(k_))
      for (int64_t r = 0; r < rows; r += amx::kRows) keys_.emplace_back(k_, q + r * dk_, dk_, tile);
    if (amx::serves_values(v_)) values_.emplace(v_, tile);
    if (!keys_.empty() && values_) return;
#endif
    // One buffer for both where it can be: a tile of keys and one of values would not fit the first-level cache. What
    // values leave must not lie beside keys of fewer channels, which are read with the columns behind them.
    values_at_ = k_.channels == v_.channels ? 0 : tile * dk_;
    tensor_.resize(values_at_ + tile * std::max(dk_, dv_));
    scratch_.resize(std::max(scratch_size(k_, tile, dk_), scratch_size(v_, tile, dv_)));
  }

  // s[row * tile + i] for tokens [from, until) of the tile that begins at token `start`.
  void scores(int64_t head, int64_t start, int from, int until, float* s) {
#ifdef PALLAS_KERNELS_AMX
    if (!keys_.empty()) {
      const amx::Codes codes(k_, head, start, from, until, codes_);
      for (auto& rows : keys_) rows.scores(head, start, from, until, codes, s), s += amx::kRows * tile_;
      return;
    }
#endif
    read_tile(k_, head, start, from, until, tile_, dk_, tensor_.data(), scratch_.data());
    for (int64_t r = 0; r < rows_; r += kRows)
      ::scores<kRows>(q_ + r * dk_, tensor_.data(), tile_, dk_, s + r * tile_, tile_);
  }

  // out += p v, of rows of dv; row r sees the tokens [seen[r].from, seen[r].until) of [from, until).
  void add(int64_t head, int64_t start, int from, int until, const Seen* seen, float* p, float* out) {
#ifdef PALLAS_KERNELS_AMX
    if (values_) {
      values_->interleave(amx::Codes(v_, head, start, from, until, codes_), from, until);
      for (int64_t r = 0; r < rows_; r += amx::kRows)
        values_->add(head, start, from, until, p + r * tile_, dv_, out + r * dv_);
      return;
    }
#endif
    float* const values = tensor_.data() + values_at_;
    read_tile(v_, head, start, from, until, tile_, dv_, values, scratch_.data());
    for (int64_t r = 0; r < rows_; r += kRows) add_rows(seen + r, p + r * tile_, values, out + r * dv_);
  }

 private:
  // A row never meets a value that it does not see, which may be NaN: tokens that all rows see are taken together, the
  // others row by row.
  void add_rows(const Seen* seen, const float* p, const float* values, float* out) {
    Seen all = seen[0];
    for (int r = 1; r < kRows; ++r)
      all = {std::max(all.from, seen[r].from), std::min(all.until, seen[r].until)};
    all.until = std::max(all.from, all.until);
    weigh_all<kRows>(p, tile_, values, all.from, all.until, dv_, out);
    for (int r = 0; r < kRows; ++r) {
      const float* const own = p + r * tile_;
      weigh_all<1>(own, tile_, values, seen[r].from, std::min(seen[r].until, all.from), dv_, out + r * dv_);
      weigh_all<1>(own, tile_, values, std::max(seen[r].from, all.until), seen[r].until, dv_, out + r * dv_);
    }
  }

  const Tensor &k_, &v_;
  const float* q_;
  const int64_t rows_;
  const int tile_;
  const int64_t dk_, dv_;
  int64_t values_at_ = 0;
  std::vector<float> tensor_, scratch_;
#ifdef PALLAS_KERNELS_AMX
  std::optional<amx::Unit> unit_;
  std::vector<amx::Keys> keys_;
  std::optional<amx::Values> values_;
  std::vector<amx::Line> codes_;
#endif
};

template <int kRows>
void attend(const Problem& pr, int64_t b, int64_t h, int64_t begin, int64_t end, int tile, Part& part) {
  const int64_t dk = round_up(pr.keys.channels, kLanes), dv = round_up(pr.values.channels, kLanes);
  const int64_t rows = pr.rows(), padded_rows = round_up(rows, kRows), per = pr.heads / pr.kv_heads;
  const int64_t head = b * pr.kv_heads + h;
  part.out.assign(padded_rows * dv, 0.0f);
  part.top.assign(padded_rows, kMasked);
  part.total.assign(padded_rows, 0.0f);
  const int64_t last = std::min<int64_t>(end, pr.stop[b]);
  if (begin >= last) return;
  std::vector<float> q(padded_rows * dk), s(padded_rows * tile);
  std::vector<Seen> seen(padded_rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < pr.keys.channels; ++d)
      q[r * dk + d] = pr.q[pr.at(b, h, r) * pr.keys.channels + d] * pr.scale;
  Reader<kRows> reader(pr, q.data(), padded_rows, tile);
  for (int64_t t0 = begin; t0 < last; t0 += tile) {
    const int n = int(std::min<int64_t>(tile, pr.keys.tokens - t0));
    // What the rows see of the tile: the first query has the lowest window, the last one the highest edge.
    const auto lower = [&](int64_t query) {
      return std::max(pr.first, pr.window ? pr.start[b] + query - pr.window + 1 : int64_t{0});
    };
    const auto upper = [&](int64_t query) { return std::min<int64_t>(pr.start[b] + query + 1, last); };
    const int from = int(std::clamp<int64_t>(lower(0) - t0, 0, n));
    const int until = int(std::clamp<int64_t>(upper(pr.queries - 1) - t0, 0, n));
    if (from >= until) continue;
    reader.scores(head, t0, from, until, s.data());
    for (int64_t row = 0; row < rows; ++row) {
      seen[row] = {int(std::clamp<int64_t>(lower(row / per) - t0, from, until)),
                   int(std::clamp<int64_t>(upper(row / per) - t0, from, until))};
      const float shrink =
          softmax(&s[row * tile], from, until, seen[row].from, seen[row].until, part.top[row], part.total[row]);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < dv; ++d) part.out[row * dv + d] *= shrink;
    }
    std::fill(s.begin() + rows * tile, s.end(), 0.0f);
    std::fill(seen.begin() + rows, seen.end(), seen[rows - 1]);
    reader.add(head, t0, from, until, seen.data(), s.data(), part.out.data());
  }
}

// The parts of one head, merged.
void merge(const Problem& pr, int64_t b, int64_t h, const Part* parts, int64_t count) {
  const int64_t channels = pr.values.channels, dv = round_up(channels, kLanes);
  for (int64_t row = 0; row < pr.rows(); ++row) {
    float top = kMasked, total = 0.0f;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, parts[i].top[row]);
    float* out = pr.output + pr.at(b, h, row) * channels;
    std::fill_n(out, channels, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float weight = std::exp(parts[i].top[row] - top);
      total += weight * parts[i].total[row];
      for (int64_t d = 0; d < channels; ++d) out[d] += weight * parts[i].out[row * dv + d];
    }
    const bool nothing = total == 0.0f;
    for (int64_t d = 0; d < channels; ++d) out[d] = nothing ? 0.0f : out[d] / total;
    pr.lse[pr.at(b, h, row)] = nothing ? kMasked : top + std::log(total);
  }
}

// Calls work(0..count-1) on the pool and on this thread, and returns when all is done. Tasks that start late find
// nothing left, so that this thread never waits for one that has not begun.
template <typename Work>
void parallel(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all.notify_all();
      }
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(run));
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all.wait(lock, [&] { return state->done.load() == count; });
}

// Reads planes, scale and zero of a tensor from the arguments that begin at `at`, and moves `at` behind them.
ffi::ErrorOr<Tensor> read_tensor(ffi::RemainingArgs& args, size_t& at, ffi::Span<const int64_t> form) {
  Tensor t{};
  t.bits = int(form[0]), t.per_channel = int(form[1]), t.group = int(form[2]), t.pack = int(form[3]);
  t.planes = int(form.size()) - 4;
  for (int i = 0; i < t.planes; ++i) {
    auto plane = args.get<ffi::AnyBuffer>(at++);
    if (!plane.has_value()) return ffi::Unexpected(plane.error());
    t.width[i] = int(form[4 + i]);
    t.plane[i] = static_cast<const uint8_t*>(plane->untyped_data());
    if (i == 0) {
      t.tokens = plane->dimensions()[2] * 8 / t.width[0], t.channels = plane->dimensions()[3];
      if (plane->element_type() == ffi::DataType::F32) t.exact32 = static_cast<const float*>(plane->untyped_data());
      if (plane->element_type() == ffi::DataType::BF16)
        t.exact16 = static_cast<const uint16_t*>(plane->untyped_data());
    }
  }
  if (t.bits == 16) return t;
  for (const uint16_t** part : {&t.scale, &t.zero}) {
    auto buffer = args.get<ffi::AnyBuffer>(at++);
    if (!buffer.has_value()) return ffi::Unexpected(buffer.error());
    *part = static_cast<const uint16_t*>(buffer->untyped_data());
  }
  return t;
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
  Problem pr{q.typed_data(), start.typed_data(), stop.typed_data(), *k, *v, dims[0], dims[1], dims[2], kv_heads,
             first, window, scale, output->typed_data(), lse->typed_data()};
  // Tokens and query rows at a time, and what tokens are a multiple of.
  int tile = 64, together = int(std::min<int64_t>(pr.rows(), 4)), unit = std::lcm(kLanes, std::max(k->pack, v->pack));
#ifdef PALLAS_KERNELS_AMX
  if (amx::serves_keys(*k) && amx::serves_values(*v)) tile = amx::kTokens;
  if (amx::serves_keys(*k) || amx::serves_values(*v)) together = amx::kRows, unit = std::lcm(64, unit);
#endif
  tile = int(round_up(tile, unit));
  if (pr.batch == 0) return ffi::Error::Success();
  const int64_t heads = pr.batch * kv_heads, tiles = (k->tokens + tile - 1) / tile;
  // Four parts a thread even the load out; a part has at least eight tiles, so that its merge does not show.
  const int64_t wanted = (4 * pool.num_threads() + heads - 1) / heads;
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tiles / 8, 1));
  std::vector<Part> parts(heads * splits);
  parallel(pool, heads * splits, [&](int64_t i) {
    const int64_t b = i / splits / kv_heads, h = i / splits % kv_heads, split = i % splits;
    const int64_t low = std::max(first, window ? pr.start[b] - window + 1 : int64_t{0}) / tile;
    const int64_t high = (std::min<int64_t>(pr.stop[b], k->tokens) + tile - 1) / tile;
    const int64_t used = std::max<int64_t>(high - low, 0);
    const int64_t begin = (low + used * split / splits) * tile, end = (low + used * (split + 1) / splits) * tile;
    const auto run = together == 1 ? attend<1> : together == 2 ? attend<2> : attend<4>;
    run(pr, b, h, begin, end, tile, parts[i]);
  });
  for (int64_t i = 0; i < heads; ++i) merge(pr, i / kv_heads, i % kv_heads, &parts[i * splits], splits);
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
