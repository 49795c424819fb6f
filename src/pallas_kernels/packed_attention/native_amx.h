// Scores and weighted sums on the matrix unit of Intel CPUs (AMX), from 8-bit codes that are never dequantised.
//
// Of s * code + z only the code is multiplied by the unit; s is moved to the other operand (queries where scales are
// those of channels, probabilities where they are those of tokens) or to the result, and z is added to the result.
// The other operand is written as a 31-bit integer times a step, and that as four signed digits of 8 bits: the four
// rows of queries that share a tile fill its 16 rows with their digits. Products and sums of integers are exact, so
// that the result is at least as good as float32 dots of dequantised values.

#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "tensor.h"

#if defined(__AMX_INT8__) && defined(__AVX512VBMI__) && defined(__linux__)
#define PALLAS_KERNELS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef PALLAS_KERNELS_AMX
namespace {
namespace amx {

constexpr int kRows = 4;      // query rows that share a tile register
constexpr int kTokens = 256;  // of the history that are unpacked at a time; a multiple of 64
constexpr int kAhead = 4096;  // bytes from those that are read to those that are fetched

// Whether the system lets this process use the unit.
bool available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Keys are multiplied 32 tokens at a time, which share scales per channel, and values 32 channels at a time, which share
// scales per token.
bool serves_keys(const Tensor& t) { return t.bits != 16 && (!t.per_channel || t.group % 32 == 0) && available(); }
bool serves_values(const Tensor& t) { return t.bits != 16 && !t.per_channel && t.group % 32 == 0 && available(); }

// While it lives, this thread's tile registers have 16 rows of 64 bytes.
struct Unit {
  Unit() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Unit() { _tile_release(); }
};

// Has all that was written in memory: GCC's tile loads do not say that they read it.
inline void settle() { asm volatile("" ::: "memory"); }

struct alignas(64) Line {
  uint8_t byte[64];
};
constexpr int kLines = 16;  // of a tile

inline IntVec load(const Line& from) {
  IntVec v;
  std::memcpy(&v, &from, sizeof v);
  return v;
}
inline void store(Line& to, IntVec v) { std::memcpy(&to, &v, sizeof v); }

// 4 x 4 bytes in each quarter: the digits of 4 numbers, |x| <= 2^30, lowest digit first. Digit j of all is lane j.
inline IntVec digits(Vec x) {
  const __m512i carry = _mm512_set1_epi32(0x808080);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i n = _mm512_cvtps_epi32((__m512)x);
  return (IntVec)_mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(n, carry), carry), order);
}

constexpr Vec kDigits = {1, 1 << 8, 1 << 16, 1 << 24, 1, 1 << 8, 1 << 16, 1 << 24,
                         1, 1 << 8, 1 << 16, 1 << 24, 1, 1 << 8, 1 << 16, 1 << 24};
constexpr float kUnit = 1.0f / (1 << 30);  // the step of numbers up to 1

// The largest absolute value of n, a multiple of 16. NaN is passed over.
inline float largest(const float* x, int64_t n) {
  Vec top = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = ::load(x + i), a = v < 0.0f ? -v : v;
    top = a > top ? a : top;
  }
  return _mm512_reduce_max_ps((__m512)top);
}

// n scales and zero points. Integers would lose a scale that is not finite: its zero point tells.
inline void read_scales(const Tensor& t, int64_t at, int64_t n, float* scale, float* zero) {
  widen(t.scale + at, n, scale);
  widen(t.zero + at, n, zero);
  for (int64_t i = 0; i < n; ++i) zero[i] += scale[i] * 0.0f;
}

// Codes of tokens [from, until) of the tile that begins at token `start` of a head, a byte each, a row a token. Rows
// up to the next multiple of 64 tokens may be read, whatever is in them.
class Codes {
 public:
  Codes(const Tensor& t, int64_t head, int64_t start, int from, int until, std::vector<Line>& buffer) {
    if (t.bits == 8 && t.channels % 64 == 0 && t.tokens % 64 == 0) {
      rows_ = t.plane[0] + (head * t.tokens + start) * t.channels, stride_ = t.channels;
      return;
    }
    stride_ = round_up(t.channels, 64);
    buffer.resize(std::max<size_t>(buffer.size(), round_up(until, 64) * stride_ / 64));
    rows_ = buffer[0].byte;
    (t.planes == 2 ? unpack<2> : unpack<1>)(t, head, start, from, until, stride_, buffer[0].byte);
  }

  const uint8_t* row(int i) const { return rows_ + i * stride_; }
  int64_t stride() const { return stride_; }

 private:
  template <int kPlanes>
  static void unpack(const Tensor& t, int64_t head, int64_t start, int from, int until, int64_t stride, uint8_t* to) {
    const int64_t channels = t.channels;
    const int run = run_of(t);
    for (int first = from / run * run; first < until; first += run) {
      const uint8_t* plane[kPlanes];
      __m512i shift[kPlanes], mask[kPlanes];
      for (int p = 0; p < kPlanes; ++p) {
        const Place at = place(t, p, head, start + first);
        plane[p] = at.bytes;
        shift[p] = _mm512_set1_epi16(at.shift);
        mask[p] = _mm512_set1_epi8((1 << t.width[p]) - 1);
      }
      const __m512i above = _mm512_set1_epi16(t.width[0]);
      const int begin = std::max(first, from), end = std::min(first + run, until);
      for (int64_t d = 0; d < channels; d += 64) {
        const __mmask64 there = channels - d >= 64 ? ~0ull : (1ull << (channels - d)) - 1;
        const auto codes = [&](int p, int i) {
          const uint8_t* at = plane[p] + (i - first) * channels + d;
          _mm_prefetch(at + kAhead, _MM_HINT_T0);
          return _mm512_and_si512(_mm512_srlv_epi16(_mm512_maskz_loadu_epi8(there, at), shift[p]), mask[p]);
        };
        for (int i = begin; i < end; ++i) {
          __m512i x = codes(0, i);
          if (kPlanes == 2) x = _mm512_or_si512(x, _mm512_sllv_epi16(codes(1, i), above));
          _mm512_store_si512(to + i * stride + d, x);
        }
      }
    }
  }

  const uint8_t* rows_;
  int64_t stride_;
};

// Scores of four query rows with the keys of a head.
class Keys {
 public:
  // q: [4, padded], zero beyond the tensor's channels.
  Keys(const Tensor& t, const float* q, int64_t padded, int tile)
      : t_(t), tile_(tile), width_(round_up(t.channels, 64)), q_(kRows * width_), x_(kRows * width_), raw_(kRows * tile),
        scale_(std::max<int64_t>(tile, width_)), zero_(scale_.size()), product_(tile) {
    for (int r = 0; r < kRows; ++r) {
      std::copy_n(q + r * padded, t.channels, &q_[r * width_]);
    }
    groups_.resize(t.per_channel ? 1 : t.channels / t.group);
    for (size_t g = 0; g < groups_.size(); ++g) {
      Group& group = groups_[g];
      group.first = t.per_channel ? 0 : g * t.group / 64;
      group.lines.resize(((t.per_channel ? width_ : (g + 1) * t.group) + 63) / 64 * kLines - group.first * kLines);
      if (t.per_channel) continue;
      std::fill(x_.begin(), x_.end(), 0.0f);
      for (int r = 0; r < kRows; ++r) {
        const float* own = &q_[r * width_ + g * t.group];
        std::copy_n(own, t.group, &x_[r * width_ + g * t.group]);
        group.bias[r] = std::accumulate(own, own + t.group, 0.0f);
      }
      write(group);
    }
  }

  // s[r * tile + i] for tokens i of [from, until); some are written on either side.
  void scores(int64_t head, int64_t start, int from, int until, const Codes& codes, float* s) {
    from = from / 32 * 32, until = int(round_up(until, 32));
    if (t_.per_channel) {
      for (int i = from; i < until;) {
        const int64_t group = (start + i) / t_.group;
        const int stop = int(std::min<int64_t>(until, (group + 1) * t_.group - start));
        scale_queries((head * (t_.tokens / t_.group) + group) * t_.channels);
        multiply(groups_[0], codes, i, stop);
        for (int r = 0; r < kRows; ++r)
          for (int j = i; j < stop; j += kLanes)
            ::store(s + r * tile_ + j, ::load(&raw_[r * tile_ + j]) * groups_[0].step[r] + groups_[0].bias[r]);
        i = stop;
      }
      return;
    }
    const int n = int(std::min<int64_t>(until, t_.tokens - start)) - from;
    for (size_t g = 0; g < groups_.size(); ++g) {
      const int64_t at = (head * groups_.size() + g) * t_.tokens + start + from;
      read_scales(t_, at, n, &scale_[from], &zero_[from]);
      multiply(groups_[g], codes, from, until);
      for (int r = 0; r < kRows; ++r)
        for (int i = from; i < until; i += kLanes) {
          const Vec x = ::load(&raw_[r * tile_ + i]) * groups_[g].step[r] * ::load(&scale_[i]) +
                        groups_[g].bias[r] * ::load(&zero_[i]);
          ::store(s + r * tile_ + i, g ? ::load(s + r * tile_ + i) + x : x);
        }
    }
  }

 private:
  // Channels that share scales: digits of the queries, from the 64 channels numbered `first` on.
  struct Group {
    int64_t first;
    std::vector<Line> lines;
    float step[kRows], bias[kRows];
  };

  // The digits of x_.
  void write(Group& group) {
    float inverse[kRows];
    for (int r = 0; r < kRows; ++r) {
      group.step[r] = largest(&x_[r * width_], width_) * kUnit;
      inverse[r] = 1.0f / group.step[r];
    }
    for (size_t i = 0; i < group.lines.size(); i += 4) {
      IntVec v[kRows];
      for (int r = 0; r < kRows; ++r)
        v[r] = digits(::load(&x_[r * width_ + group.first * 64 + i / 4 * kLanes]) * inverse[r]);
      transpose_quarters(v);
      for (int j = 0; j < 4; ++j) store(group.lines[i + j], v[j]);
    }
  }

  // Queries times the scales per channel at `at`, and their sums weighted by the zero points.
  void scale_queries(int64_t at) {
    read_scales(t_, at, t_.channels, scale_.data(), zero_.data());
    Vec bias[kLanes] = {};
    for (int64_t d = 0; d < width_; d += kLanes)
      for (int r = 0; r < kRows; ++r) {
        const Vec q = ::load(&q_[r * width_ + d]);
        ::store(&x_[r * width_ + d], q * ::load(&scale_[d]));
        bias[r] += q * ::load(&zero_[d]);
      }
    const Vec total = sums(bias);
    for (int r = 0; r < kRows; ++r) groups_[0].bias[r] = total[r];
    write(groups_[0]);
  }

  // raw_ = products of whole codes and whole digits for tokens [from, until), multiples of 32.
  void multiply(const Group& group, const Codes& codes, int from, int until) {
    settle();
    // All tiles first: the unit's latency is that of several tiles.
    for (int i = from; i < until; i += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (size_t c = 0; c < group.lines.size(); c += kLines) {
        const int64_t channel = (group.first + c / kLines) * 64;
        _tile_loadd(2, &group.lines[c], 64);
        _tile_loadd(3, codes.row(i) + channel, codes.stride());
        _tile_loadd(4, codes.row(i + 16) + channel, codes.stride());
        _tile_dpbusd(0, 3, 2);
        _tile_dpbusd(1, 4, 2);
      }
      _tile_stored(0, &product_[i], 64);
      _tile_stored(1, &product_[i + 16], 64);
    }
    for (int i = from; i < until; i += kLanes) {
      Vec v[kLanes];
      for (int j = 0; j < kLanes; ++j) v[j] = __builtin_convertvector(load(product_[i + j]), Vec) * kDigits;
      sums_of_quarters(v);
      transpose_quarters(v);
      for (int r = 0; r < kRows; ++r) ::store(&raw_[r * tile_ + i], v[r]);
    }
  }

  const Tensor& t_;
  const int tile_;
  const int64_t width_;
  std::vector<float> q_, x_, raw_, scale_, zero_;
  std::vector<Line> product_;  // of tokens, 4 digits of 4 queries
  std::vector<Group> groups_;
};

// Sums of a head's values weighted by four rows of probabilities.
class Values {
 public:
  Values(const Tensor& t, int tile)
      : t_(t), tile_(tile), lines_(tile / 64 * (t.channels / kLanes) * kLines), digits_(tile / 64 * kLines),
        product_(t.channels), x_(tile), scale_(tile), zero_(tile) {}

  // The codes of tokens [from, until), four tokens side by side, as `add` takes them.
  void interleave(const Codes& codes, int from, int until) {
    const int64_t channels = t_.channels;
    Line order;  // of 4 x 16 bytes, transposed
    for (int j = 0; j < 64; ++j) order.byte[j] = j % 4 * 16 + j / 4;
    for (int i = from / 4 * 4; i < until; i += 4) {
      Line* to = &lines_[i / 64 * (channels / kLanes) * kLines + line_of(i % 64 / 4)];
      const uint8_t* const rows[4] = {codes.row(i), codes.row(i + 1), codes.row(i + 2), codes.row(i + 3)};
      for (int64_t d = 0; d < channels; d += kLanes, to += kLines) {
        const auto row = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[j] + d)); };
        __m512i x = _mm512_castsi128_si512(row(0));
        x = _mm512_inserti32x4(x, row(1), 1);
        x = _mm512_inserti32x4(x, row(2), 2);
        x = _mm512_inserti32x4(x, row(3), 3);
        store(*to, (IntVec)_mm512_permutexvar_epi8((__m512i)load(order), x));
      }
    }
  }

  // out[r * padded + d] += sum over tokens of p[r * tile + i] * value.
  void add(int64_t head, int64_t start, int from, int until, float* p, int64_t padded, float* out) {
    const int begin = from / 64 * 64, end = int(round_up(until, 64));
    for (int r = 0; r < kRows; ++r) {
      std::fill(p + r * tile_ + begin, p + r * tile_ + from, 0.0f);
      std::fill(p + r * tile_ + until, p + r * tile_ + end, 0.0f);
    }
    const int64_t groups = t_.channels / t_.group;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (head * groups + g) * t_.tokens + start + from;
      std::fill(&scale_[begin], &scale_[from], 0.0f);
      std::fill(&zero_[begin], &zero_[from], 0.0f);
      read_scales(t_, at, until - from, &scale_[from], &zero_[from]);
      std::fill(scale_.data() + until, scale_.data() + end, 0.0f);
      std::fill(zero_.data() + until, zero_.data() + end, 0.0f);
      float step[kRows], bias[kRows];
      write(p, begin, end, step, bias);
      multiply(g, begin, end, step, bias, out, padded);
    }
  }

 private:
  // Where the tokens 4i to 4i + 3 of 64 stand in a tile: as `write` leaves its digits.
  static int line_of(int i) { return i % 4 * 4 + i / 4; }

  // Digits of probabilities times scales, and the probabilities' sums weighted by zero points.
  void write(const float* p, int begin, int end, float* step, float* bias) {
    Vec total[kLanes] = {};
    for (int r = 0; r < kRows; ++r) {
      for (int i = begin; i < end; i += kLanes) {
        const Vec x = ::load(p + r * tile_ + i);
        const IntVec some = x != 0.0f;  // what a row does not see may be NaN
        total[r] += some ? x * ::load(&zero_[i]) : Vec{};
        ::store(&x_[i], some ? x * ::load(&scale_[i]) : Vec{});
      }
      step[r] = largest(&x_[begin], end - begin) * kUnit;
      const float inverse = 1.0f / step[r];
      for (int i = begin; i < end; i += 64) {
        __m512i v[4];
        for (int j = 0; j < 4; ++j) v[j] = (__m512i)digits(::load(&x_[i + j * kLanes]) * inverse);
        // In each quarter, lane k of v[j] becomes lane j of digit k.
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        Line* to = &digits_[i / 64 * kLines + r * 4];
        store(to[0], (IntVec)_mm512_unpacklo_epi64(a, c));
        store(to[1], (IntVec)_mm512_unpackhi_epi64(a, c));
        store(to[2], (IntVec)_mm512_unpacklo_epi64(b, d));
        store(to[3], (IntVec)_mm512_unpackhi_epi64(b, d));
      }
    }
    const Vec all = sums(total);
    for (int r = 0; r < kRows; ++r) bias[r] = all[r];
  }

  // Channels of group g.
  void multiply(int64_t g, int begin, int end, const float* step, const float* bias, float* out, int64_t padded) {
    settle();
    const int64_t across = t_.channels / kLanes, first = g * t_.group / kLanes, last = first + t_.group / kLanes;
    for (int64_t c = first; c < last; c += 2) {  // all tiles first, as above
      _tile_zero(0);
      _tile_zero(1);
      for (int i = begin / 64; i < end / 64; ++i) {
        const Line* codes = &lines_[(i * across + c) * kLines];
        _tile_loadd(2, &digits_[i * kLines], 64);
        _tile_loadd(3, codes, 64);
        _tile_loadd(4, codes + kLines, 64);
        _tile_dpbsud(0, 2, 3);
        _tile_dpbsud(1, 2, 4);
      }
      _tile_stored(0, &product_[c * kLines], 64);
      _tile_stored(1, &product_[c * kLines + kLines], 64);
    }
    for (int64_t c = first; c < last; ++c)
      for (int r = 0; r < kRows; ++r) {
        Vec x = {};
        for (int j = 3; j >= 0; --j)
          x = x * 256.0f + __builtin_convertvector(load(product_[c * kLines + r * 4 + j]), Vec);
        float* to = out + r * padded + c * kLanes;
        ::store(to, ::load(to) + (x * step[r] + bias[r]));
      }
  }

  const Tensor& t_;
  const int tile_;
  std::vector<Line> lines_, digits_, product_;
  std::vector<float> x_, scale_, zero_;
};

}  // namespace amx
}  // namespace

#endif
