// Quantisation and packing of blocks, see __init__.py. Groups lie side by side in the lanes of vectors, so that scales
// per token, whose groups are turned first, and per channel take the same code. The search for the least squared error
// is that of least_squares.py, step by step: its sums are exact in any order, and it adds no product, so that the bits
// are those of every other implementation.

#include "parallel.h"
#include "tensor.h"

namespace ffi = xla::ffi;

namespace {

inline Vec rounded(Vec x) {
#ifdef __AVX512F__
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

// As float16 holds it.
inline Vec narrowed(Vec x) {
#ifdef __AVX512F__
  return (Vec)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
  return (Vec)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
}

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Codes as bytes.
inline Bytes bytes(Vec codes) { return __builtin_convertvector(__builtin_convertvector(codes, IntVec), Bytes); }

inline Vec least(Vec a, Vec b) { return a < b ? a : b; }
inline Vec most(Vec a, Vec b) { return a > b ? a : b; }
inline Vec within(Vec x, float low, float high) { return least(most(x, splat(low)), splat(high)); }
inline Vec where(IntVec condition, Vec x) { return (Vec)(condition & (IntVec)x); }

// The settings of least_squares.py: how many ranges are tried, none where scales are not fitted, and refits of the best;
// into how many parts a step and a squared step are divided.
struct Fit {
  int64_t candidates, refits;
  float part, squared_part;
};

// `size` entries of kLanes groups, one group in each lane, and which of them count: a row for each entry, or one for
// all where step is 0.
struct Groups {
  const float* x;
  const int32_t* counted;
  int64_t size, step;
  float levels;

  Vec entry(int64_t i) const { return load(x + i * kLanes); }
  IntVec counts(int64_t i) const {
    IntVec v;
    std::memcpy(&v, counted + i * step * kLanes, sizeof v);
    return v;
  }
};

struct Sums {
  Vec squared{}, c{}, cc{}, e{}, ce{};
};

struct Affine {
  Vec scale, zero;
};

// From minimum and maximum; NaN where a group cannot be stored.
Affine of_range(const Groups& g) {
  Vec low = splat(INFINITY), high = splat(-INFINITY);
  IntVec unknown{}, some{};
  for (int64_t i = 0; i < g.size; ++i) {
    const Vec x = g.entry(i);
    const IntVec counts = g.counts(i);
    low = least(counts ? x : splat(INFINITY), low), high = most(counts ? x : splat(-INFINITY), high);
    unknown |= (x != x) & counts, some |= counts;
  }
  low = where(some, low), high = where(some, high);
  const Vec scale = narrowed((high - low) / splat(g.levels)), zero = narrowed(low);
  const IntVec finite = (scale - scale == 0.0f) & (zero - zero == 0.0f) & ~unknown;
  return {finite ? scale : splat(NAN), finite ? zero : splat(NAN)};
}

// least_squares.py's `search` and `entries`.
class Search {
 public:
  Search(const Groups& g, const Fit& fit, Affine range) : g_(g), fit_(fit), range_(range), most_(std::sqrt(g.size)) {
    IntVec count{};
    for (int64_t i = 0; i < g.size; ++i) count -= g.counts(i);
    count_ = most(__builtin_convertvector(count, Vec), splat(1.0f));
  }

  Affine run() const {
    Affine best = range_, next = range_;
    Vec least_error = splat(INFINITY);
    for (int i = 0; i < fit_.candidates + fit_.refits; ++i) {
      const Affine tried = i < fit_.candidates ? narrower(2.0f * i) : next;
      const Affine at{narrowed(tried.scale), narrowed(tried.zero)};
      const Sums found = sums(at);
      Vec error = at.scale * at.scale * found.squared;
      // Where float16 rounds the zero point by steps, distances are cut and cannot be compared: the range stays.
      if (i == 0) error = found.squared > count_ * fit_.squared_part ? Vec{} : error;
      const IntVec better =
          (error < least_error) & (at.scale >= range_.scale * 0.5f) & (at.zero - at.zero == 0.0f);
      const Affine again = refit(at, found);
      least_error = better ? error : least_error;
      best = {better ? at.scale : best.scale, better ? at.zero : best.zero};
      next = {better ? again.scale : next.scale, better ? again.zero : next.zero};
    }
    return best;
  }

 private:
  Affine narrower(float cut) const {
    const Vec scale = range_.scale, parts = splat(25.0f);
    return {scale * (splat(25.0f - cut) / parts),
            range_.zero + scale * (splat(cut) / parts) * g_.levels / splat(2.0f)};
  }

  Sums sums(Affine at) const {
    const Vec s = at.scale > 0.0f ? at.scale : splat(1.0f);
    Sums sum;
    for (int64_t i = 0; i < g_.size; ++i) {
      const IntVec counts = g_.counts(i);
      const Vec steps = (g_.entry(i) - at.zero) / s, codes = rounded(within(steps, 0.0f, g_.levels));
      const Vec off = where(counts, within(steps - codes, -most_, most_));
      const Vec c = where(counts, codes), e = rounded(off * fit_.part);
      sum.squared += rounded(off * off * fit_.squared_part);
      sum.c += c, sum.cc += c * c, sum.e += e, sum.ce += c * e;
    }
    return sum;
  }

  Affine refit(Affine at, const Sums& found) const {
    const Vec turned = found.cc - found.c * found.c / count_, along = found.ce - found.c * found.e / count_;
    const Vec spread = turned > 0.0f ? turned : splat(INFINITY);  // one code for all: nothing to turn
    const Vec offset = found.e - along * found.c / spread;
    return {at.scale + at.scale * along / (spread * fit_.part),
            at.zero + at.scale * offset / (count_ * fit_.part)};
  }

  const Groups& g_;
  const Fit& fit_;
  const Affine range_;
  const float most_;
  Vec count_;
};

struct Problem {
  const float* x;
  const bool* counted;
  int64_t heads, tokens, channels, group;
  bool per_channel;
  Fit fit;
  ffi::Span<const int64_t> widths;
  int bits;
  uint16_t *scale, *zero;
  uint8_t* plane[2];
};

// One block of one head.
class Block {
 public:
  Block(const Problem& pr, int64_t n, int64_t head)
      : pr_(pr), at_(n * pr.heads + head), x_(pr.x + at_ * pr.tokens * pr.channels), counted_(pr.counted + n * pr.tokens),
        entries_(pr.group * kLanes), turned_(pr.per_channel ? 0 : pr.group * kLanes), codes_(pr.tokens * pr.channels),
        counts_(pr.group * kLanes) {}

  void run() {
    // Groups follow one another along `outer`, and those of neighbouring `inner` share a vector.
    const int64_t outer = (pr_.per_channel ? pr_.tokens : pr_.channels) / pr_.group;
    const int64_t inner = pr_.per_channel ? pr_.channels : pr_.tokens;
    for (int64_t g = 0; g < outer; ++g)
      for (int64_t i = 0; i < inner; i += kLanes) encode(g, i, std::min<int64_t>(kLanes, inner - i), outer, inner);
    pack();
  }

 private:
  // The place in the block of entry 0 of the group in lane 0.
  int64_t start(int64_t g, int64_t i) const {
    return pr_.per_channel ? g * pr_.group * pr_.channels + i : i * pr_.channels + g * pr_.group;
  }

  // Whether groups per token are turned by whole vectors.
  bool turns(int64_t lanes) const { return !pr_.per_channel && lanes == kLanes && pr_.group % kLanes == 0; }

  // Reads the groups of all lanes.
  void gather(const float* x, int64_t lanes) {
    if (turns(lanes)) return transpose(x, pr_.channels, kLanes, pr_.group, entries_.data(), kLanes);
    const int64_t entry = pr_.per_channel ? pr_.channels : 1, lane = pr_.per_channel ? 1 : pr_.channels;
    for (int64_t e = 0; e < pr_.group; ++e) {
      float* const to = &entries_[e * kLanes];
      if (lane == 1 && lanes == kLanes) {
        store(to, load(x + e * entry));
      } else {
        for (int64_t l = 0; l < kLanes; ++l) to[l] = l < lanes ? x[e * entry + l * lane] : 0.0f;
      }
    }
  }

  // Writes codes where the entries were.
  void scatter(uint8_t* to, int64_t lanes) {
    if (turns(lanes)) {
      transpose(entries_.data(), kLanes, pr_.group, kLanes, turned_.data(), pr_.group);
      for (int64_t l = 0; l < kLanes; ++l)
        for (int64_t e = 0; e < pr_.group; e += kLanes) {
          const Bytes codes = bytes(load(&turned_[l * pr_.group + e]));
          std::memcpy(to + l * pr_.channels + e, &codes, sizeof codes);
        }
      return;
    }
    const int64_t entry = pr_.per_channel ? pr_.channels : 1, lane = pr_.per_channel ? 1 : pr_.channels;
    for (int64_t e = 0; e < pr_.group; ++e) {
      const Bytes codes = bytes(load(&entries_[e * kLanes]));
      if (lane == 1 && lanes == kLanes) {
        std::memcpy(to + e * entry, &codes, sizeof codes);
      } else {
        for (int64_t l = 0; l < lanes; ++l) to[e * entry + l * lane] = codes[l];
      }
    }
  }

  void encode(int64_t g, int64_t i, int64_t lanes, int64_t outer, int64_t inner) {
    gather(x_ + start(g, i), lanes);
    const int64_t rows = pr_.per_channel ? pr_.group : 1;
    for (int64_t e = 0; e < rows; ++e)
      for (int64_t l = 0; l < kLanes; ++l)
        counts_[e * kLanes + l] = -int32_t(l < lanes && counted_[pr_.per_channel ? g * pr_.group + e : i + l]);
    const float levels = float((1 << pr_.bits) - 1);
    const Groups groups{entries_.data(), counts_.data(), pr_.group, pr_.per_channel, levels};
    Affine how = of_range(groups);
    if (pr_.fit.candidates) how = Search(groups, pr_.fit, how).run();
    keep(how.scale, lanes, pr_.scale + (at_ * outer + g) * inner + i);
    keep(how.zero, lanes, pr_.zero + (at_ * outer + g) * inner + i);
    const IntVec flat = how.scale == 0.0f;
    const Vec s = flat ? splat(1.0f) : how.scale;
    for (int64_t e = 0; e < pr_.group; ++e) {
      const Vec code = within(rounded((groups.entry(e) - how.zero) / s), 0.0f, levels);
      store(&entries_[e * kLanes], where(~flat, code));
    }
    scatter(&codes_[start(g, i)], lanes);
  }

  static void keep(Vec x, int64_t lanes, uint16_t* to) {
    for (int64_t l = 0; l < lanes; ++l) to[l] = _cvtss_sh(x[l], _MM_FROUND_TO_NEAREST_INT);
  }

  void pack() const {
    for (size_t p = 0, shift = 0; p < pr_.widths.size(); shift += pr_.widths[p++]) {
      const int64_t width = pr_.widths[p], rows = pr_.tokens * width / 8, size = rows * pr_.channels;
      uint8_t* const to = pr_.plane[p] + at_ * size;
      const uint8_t mask = (1 << width) - 1;
      for (int64_t j = 0; j < 8 / width; ++j) {
        const uint8_t* const from = codes_.data() + j * size;
        for (int64_t b = 0; b < size; ++b) {
          const uint8_t bits = ((from[b] >> shift) & mask) << (j * width);
          to[b] = j ? to[b] | bits : bits;
        }
      }
    }
  }

  const Problem& pr_;
  const int64_t at_;
  const float* const x_;
  const bool* const counted_;
  Floats entries_, turned_;
  std::vector<uint8_t> codes_;
  std::vector<int32_t> counts_;
};

ffi::Error quantize_pack(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::PRED> counted,
                         ffi::RemainingRets results, ffi::Span<const int64_t> widths, int64_t per_channel,
                         int64_t group, int64_t candidates, int64_t refits, ffi::Span<const float> parts) {
  const auto dims = x.dimensions();
  Problem pr{x.typed_data(), counted.typed_data(), dims[1], dims[2], dims[3], group, per_channel != 0,
             {candidates, refits, parts[0], parts[1]}, widths, 0, nullptr, nullptr, {}};
  for (size_t i = 0; i < 2 + widths.size(); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return result.error();
    void* const data = (*result)->untyped_data();
    if (i < 2) {
      (i ? pr.zero : pr.scale) = static_cast<uint16_t*>(data);
    } else {
      pr.plane[i - 2] = static_cast<uint8_t*>(data), pr.bits += int(widths[i - 2]);
    }
  }
  parallel(pool, dims[0] * dims[1], [&pr](int64_t i) { Block(pr, i / pr.heads, i % pr.heads).run(); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pallas_kernels_quantize_pack, quantize_pack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("widths")
                                  .Attr<int64_t>("per_channel")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("candidates")
                                  .Attr<int64_t>("refits")
                                  .Attr<ffi::Span<const float>>("parts"));
