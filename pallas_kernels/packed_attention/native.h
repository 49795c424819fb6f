// Vectors of 16 floats, and packed tensors as they come from JAX.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
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
  const _Float16 *scale, *zero;
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

void widen(const _Float16* from, int64_t n, float* to) {
  int64_t d = 0;
#ifdef __AVX512F__
  for (; d + kLanes <= n; d += kLanes)
    store(to + d, (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d))));
#endif
  for (; d < n; ++d) to[d] = from[d];
}

// Within each quarter of 4 lanes, the sums of 16 vectors: v[i] is given those of vectors 4i to 4i+3 as its lanes.
inline void sums_of_quarters(Vec v[kLanes]) {
  for (int i = 0; i < 8; ++i)
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  for (int i = 0; i < 4; ++i)
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Quarter j of v[i] becomes quarter i of v[j], i and j from 0 to 3.
template <typename V>
inline void transpose_quarters(V v[4]) {
  const V a = __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const V b = __builtin_shufflevector(v[0], v[1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  const V c = __builtin_shufflevector(v[2], v[3], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const V d = __builtin_shufflevector(v[2], v[3], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  v[1] = __builtin_shufflevector(b, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  v[2] = __builtin_shufflevector(a, c, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  v[3] = __builtin_shufflevector(b, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// Sums of 16 vectors' lanes, as the lanes of one.
inline Vec sums(Vec v[kLanes]) {
  sums_of_quarters(v);
  transpose_quarters(v);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

}  // namespace
