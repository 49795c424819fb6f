// Vectors of 16 floats (AVX-512) or of 8 (AVX2), packed tensors as they come from JAX, and their tiles as floats.

#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "expected a CPU with AVX2, FMA and F16C; on others XLA's own code runs"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "xla/ffi/api/ffi.h"

// Lanes of two vectors by their numbers; GCC before 12 has another name for it.
#if defined(__clang__) || __GNUC__ >= 12
#define PALLAS_KERNELS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PALLAS_KERNELS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

// Floats on whole lines of the cache: a vector that lies across two takes two loads.
template <typename T>
struct OnLines {
  typedef T value_type;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const OnLines&) const { return true; }
  bool operator!=(const OnLines&) const { return false; }
};
typedef std::vector<float, OnLines<float>> Floats;

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec splat(float x) { return x - Vec{}; }

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One packed tensor, see layout.Packed.
struct Tensor {
  int bits, per_channel, group, pack, planes;
  int width[2];
  const uint8_t* plane[2];
  const float* exact32;
  const uint16_t* exact16;  // bfloat16
  const uint16_t *scale, *zero;  // float16
  int64_t tokens, channels;
};

// Where the codes of a token stand in a plane: its bytes, and by how much they are shifted.
struct Place {
  const uint8_t* bytes;
  int shift;
};

inline Place place(const Tensor& t, int plane, int64_t head, int64_t token) {
  const int rows = t.pack * t.width[plane] / 8, in = token % t.pack;
  const int64_t block = head * (t.tokens / t.pack) + token / t.pack;
  return {t.plane[plane] + (block * rows + in % rows) * t.channels, in / rows * t.width[plane]};
}

// Tokens, from a packing block's first on, that stand in one shift of every plane.
inline int run_of(const Tensor& t) {
  int run = t.pack;
  for (int p = 0; p < t.planes; ++p) run = t.pack * t.width[p] / 8 < run ? t.pack * t.width[p] / 8 : run;
  return run;
}

// The next bytes, one in each lane.
inline IntVec bytes_at(const uint8_t* from) {
#ifdef __AVX512F__
  return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
}

void widen(const uint16_t* from, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
#ifdef __AVX512F__
    store(to + d, (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d))));
#else
    store(to + d, (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d))));
#endif
  }
  for (; d < n; ++d) to[d] = _cvtsh_ss(from[d]);
}

#ifdef __AVX512F__
// Within each quarter of 4 lanes, the sums of 16 vectors: v[i] is given those of vectors 4i to 4i+3 as its lanes.
inline void sums_of_quarters(Vec v[kLanes]) {
  for (int i = 0; i < 8; ++i)
    v[i] = PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  for (int i = 0; i < 4; ++i)
    v[i] = PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Quarter j of v[i] becomes quarter i of v[j], i and j from 0 to 3.
template <typename V>
inline void transpose_quarters(V v[4]) {
  const V a = PALLAS_KERNELS_SHUFFLE(v[0], v[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const V b = PALLAS_KERNELS_SHUFFLE(v[0], v[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  const V c = PALLAS_KERNELS_SHUFFLE(v[2], v[3], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const V d = PALLAS_KERNELS_SHUFFLE(v[2], v[3], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  v[0] = PALLAS_KERNELS_SHUFFLE(a, c, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  v[1] = PALLAS_KERNELS_SHUFFLE(b, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  v[2] = PALLAS_KERNELS_SHUFFLE(a, c, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  v[3] = PALLAS_KERNELS_SHUFFLE(b, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// Sums of 16 vectors' lanes, as the lanes of one.
inline Vec sums(Vec v[kLanes]) {
  sums_of_quarters(v);
  transpose_quarters(v);
  return (v[0] + v[1]) + (v[2] + v[3]);
}
#else
// Sums of 8 vectors' lanes, as the lanes of one.
inline Vec sums(Vec v[kLanes]) {
  for (int i = 0; i < 4; ++i)
    v[i] = PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
           PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  for (int i = 0; i < 2; ++i)
    v[i] = PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           PALLAS_KERNELS_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return PALLAS_KERNELS_SHUFFLE(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         PALLAS_KERNELS_SHUFFLE(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif

// The lanes of a vector, combined in pairs.
template <typename Combine>
inline float reduce(Vec v, Combine combine) {
#ifdef __AVX512F__
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = combine(v, PALLAS_KERNELS_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
  return v[0];
}

// Rows of x, which are `stride` apart, as columns of `to`; rows and columns are multiples of kLanes. A square of vectors
// is turned by as many perfect shuffles as its size has bits.
inline void transpose(const float* x, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec from[kLanes], next[kLanes];
      for (int i = 0; i < kLanes; ++i) from[i] = load(x + (r + i) * stride + c);
      for (int size = 1; size < kLanes; size *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
          const Vec a = from[i], b = from[i + kLanes / 2];
#ifdef __AVX512F__
          next[2 * i] = PALLAS_KERNELS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
          next[2 * i + 1] = PALLAS_KERNELS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
          next[2 * i] = PALLAS_KERNELS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
          next[2 * i + 1] = PALLAS_KERNELS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
        }
        std::copy(next, next + kLanes, from);
      }
      for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, from[i]);
    }
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

// Reads planes, scale and zero of a tensor from the arguments that begin at `at`, and moves `at` behind them.
xla::ffi::ErrorOr<Tensor> read_tensor(xla::ffi::RemainingArgs& args, size_t& at, xla::ffi::Span<const int64_t> form) {
  Tensor t{};
  t.bits = int(form[0]), t.per_channel = int(form[1]), t.group = int(form[2]), t.pack = int(form[3]);
  t.planes = int(form.size()) - 4;
  for (int i = 0; i < t.planes; ++i) {
    auto plane = args.get<xla::ffi::AnyBuffer>(at++);
    if (!plane.has_value()) return xla::ffi::Unexpected(plane.error());
    t.width[i] = int(form[4 + i]);
    t.plane[i] = static_cast<const uint8_t*>(plane->untyped_data());
    if (i == 0) {
      t.tokens = plane->dimensions()[2] * 8 / t.width[0], t.channels = plane->dimensions()[3];
      if (plane->element_type() == xla::ffi::DataType::F32)
        t.exact32 = static_cast<const float*>(plane->untyped_data());
      if (plane->element_type() == xla::ffi::DataType::BF16)
        t.exact16 = static_cast<const uint16_t*>(plane->untyped_data());
    }
  }
  if (t.bits == 16) return t;
  for (const uint16_t** part : {&t.scale, &t.zero}) {
    auto buffer = args.get<xla::ffi::AnyBuffer>(at++);
    if (!buffer.has_value()) return xla::ffi::Unexpected(buffer.error());
    *part = static_cast<const uint16_t*>(buffer->untyped_data());
  }
  return t;
}

}  // namespace
