// Vectors of 16 floats (AVX-512) or of 8 (AVX2), and packed tensors as they come from JAX.

#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "expected a CPU with AVX2, FMA and F16C; on others XLA's own code runs"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstring>

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

}  // namespace
