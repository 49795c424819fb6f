// Attention of a few queries, a tile of tokens at a time under an online softmax: what packed and rebuilt keys share.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "tensor.h"

namespace {

constexpr float kMasked = -1e30f;  // layout.MASKED
constexpr int kMany = 6;  // query rows whose sums a product holds in registers, where there are many
constexpr int kFew = 4;   // and where there are few

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
  const float best = reduce(tops, [](Vec a, Vec b) { return a > b ? a : b; });
  for (int i = from / kLanes * kLanes; i < until; i += kLanes) {
    const Vec x = ((lanes + i >= lo) & (lanes + i < hi)) ? exponential(load(p + i) - best) : Vec{};
    store(p + i, x);
    sum += x;
  }
  const float shrink = best == top ? 1.0f : std::exp(top - best);
  total = total * shrink + reduce(sum, [](Vec a, Vec b) { return a + b; });
  top = best;
  return shrink;
}

// The arguments and results of a call.
struct Problem {
  const float* q;  // [B, T, H, D]
  const int32_t *start, *stop;
  Tensor keys, values;
  int64_t batch, queries, heads, head_dim, kv_heads, first, window;  // window 0: none
  float scale;
  float *output, *lse;

  int64_t rows() const { return queries * (heads / kv_heads); }
  int64_t at(int64_t b, int64_t h, int64_t row) const {  // of a row in [B, T, H]
    const int64_t per = heads / kv_heads;
    return (b * queries + row / per) * heads + h * per + row % per;
  }
  // The lowest token that a query sees.
  int64_t lower(int64_t b, int64_t query) const {
    return std::max(first, window ? start[b] + query - window + 1 : int64_t{0});
  }
};

// Tokens [start + from, start + until) that some query sees, of the tile that begins at `start`.
struct Tile {
  int64_t start;
  int from, until;
};

// Calls work(tile) for the tiles of tokens [begin, end) that some query sees.
template <typename Work>
void each_tile(const Problem& pr, int64_t b, int64_t begin, int64_t end, int tile, Work work) {
  const int64_t last = std::min<int64_t>(end, pr.stop[b]);
  // The first query has the lowest window, the last one the highest edge.
  const int64_t low = pr.lower(b, 0), high = std::min<int64_t>(pr.start[b] + pr.queries, last);
  for (int64_t t = begin; t < last; t += tile) {
    const int64_t n = std::min<int64_t>(tile, pr.keys.tokens - t);
    const int from = int(std::clamp<int64_t>(low - t, 0, n)), until = int(std::clamp<int64_t>(high - t, 0, n));
    if (from < until) work(Tile{t, from, until});
  }
}

// Tokens of a tile that a query row sees.
struct Seen {
  int from, until;
};

// What one part of the tokens gives a head: unnormalised outputs, maxima and sums.
struct Part {
  Floats out, top, total;
};

// The query rows of a kv head on their way through one part of the tokens: of each tile scores, probabilities, sums.
template <int kRows>
struct Rows {
  Rows(const Problem& pr, int64_t b, int64_t h, int tile, Part& part)
      : pr(pr), b(b), count(pr.rows()), padded(round_up(count, kRows)), dk(round_up(pr.head_dim, kLanes)),
        dv(round_up(pr.values.channels, kLanes)), tile(tile), q(padded * dk), s(padded * tile),
        turned(kRows == kMany ? dk * tile : 0), seen(padded), part(part) {
    part.out.assign(padded * dv, 0.0f);
    part.top.assign(padded, kMasked);
    part.total.assign(padded, 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const float* const from = pr.q + pr.at(b, h, r) * pr.head_dim;
      for (int64_t d = 0; d < pr.head_dim; ++d) q[r * dk + d] = from[d] * pr.scale;
    }
  }

  // s = q k, of all keys of a tile in rows of dk.
  void scores(const float* k) {
    if constexpr (kRows == kMany) {
      transpose(k, dk, tile, dk, turned.data(), tile);
      std::fill(s.begin(), s.end(), 0.0f);
      for (int64_t r = 0; r < padded; r += kRows)
        weigh_all<kRows>(&q[r * dk], int(dk), turned.data(), 0, int(pr.head_dim), tile, &s[r * tile]);
    } else {
      for (int64_t r = 0; r < padded; r += kRows) ::scores<kRows>(&q[r * dk], k, tile, dk, &s[r * tile], tile);
    }
  }

  // Scores become probabilities, and sums so far shrink.
  void weights(const Tile& t) {
    const int64_t per = pr.heads / pr.kv_heads;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t query = row / per;
      seen[row] = {int(std::clamp<int64_t>(pr.lower(b, query) - t.start, t.from, t.until)),
                   int(std::clamp<int64_t>(pr.start[b] + query + 1 - t.start, t.from, t.until))};
      const float shrink =
          softmax(&s[row * tile], t.from, t.until, seen[row].from, seen[row].until, part.top[row], part.total[row]);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < dv; ++d) part.out[row * dv + d] *= shrink;
    }
    std::fill(s.begin() + count * tile, s.end(), 0.0f);
    std::fill(seen.begin() + count, seen.end(), seen[count - 1]);
  }

  // Sums go on with values in rows of dv. A row never meets a value that it does not see, which may be NaN: tokens that
  // all rows see are taken together, the others row by row.
  void add(const float* values) {
    for (int64_t r = 0; r < padded; r += kRows) {
      const float* const p = &s[r * tile];
      float* const out = &part.out[r * dv];
      Seen all = seen[r];
      for (int j = 1; j < kRows; ++j)
        all = {std::max(all.from, seen[r + j].from), std::min(all.until, seen[r + j].until)};
      all.until = std::max(all.from, all.until);
      weigh_all<kRows>(p, tile, values, all.from, all.until, dv, out);
      for (int j = 0; j < kRows; ++j) {
        const Seen own = seen[r + j];
        const float* const weight = p + j * tile;
        weigh_all<1>(weight, tile, values, own.from, std::min(own.until, all.from), dv, out + j * dv);
        weigh_all<1>(weight, tile, values, std::max(own.from, all.until), own.until, dv, out + j * dv);
      }
    }
  }

  const Problem& pr;
  const int64_t b, count, padded, dk, dv;
  const int tile;
  Floats q, s, turned;  // a tile's keys as columns
  std::vector<Seen> seen;
  Part& part;
};

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

// Cuts the tokens of every sequence into parts, calls work(b, g, begin, end, parts, stride) for each on any thread, and
// merges. `groups` divide the kv heads; parts[j * stride] is that of the j-th head of group g. A part has at least
// `least` tiles, so that its merge does not show.
template <typename Work>
void attend_parts(xla::ffi::ThreadPool& pool, const Problem& pr, int64_t groups, int tile, int least, Work work) {
  const int64_t per = pr.kv_heads / groups, tasks = pr.batch * groups;
  if (tasks == 0) return;
  const int64_t tiles = (pr.keys.tokens + tile - 1) / tile;
  // Four parts a thread even the load out.
  const int64_t wanted = (4 * pool.num_threads() + tasks - 1) / tasks;
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(tiles / least, 1));
  std::vector<Part> parts(tasks * per * splits);
  parallel(pool, tasks * splits, [&](int64_t i) {
    const int64_t b = i / splits / groups, g = i / splits % groups, split = i % splits;
    const int64_t low = pr.lower(b, 0) / tile;
    const int64_t high = (std::min<int64_t>(pr.stop[b], pr.keys.tokens) + tile - 1) / tile;
    const int64_t used = std::max<int64_t>(high - low, 0);
    const int64_t begin = (low + used * split / splits) * tile, end = (low + used * (split + 1) / splits) * tile;
    work(b, g, begin, end, &parts[(b * groups + g) * per * splits + split], splits);
    for (int64_t h = g * per; splits == 1 && h < (g + 1) * per; ++h) merge(pr, b, h, &parts[b * pr.kv_heads + h], 1);
  });
  for (int64_t i = 0; splits > 1 && i < pr.batch * pr.kv_heads; ++i)
    merge(pr, i / pr.kv_heads, i % pr.kv_heads, &parts[i * splits], splits);
}

// Calls run with how many query rows are taken together, as a type.
template <typename Run>
void by_rows(int64_t rows, Run run) {
  if (rows == 1) return run(std::integral_constant<int, 1>{});
  if (rows == 2) return run(std::integral_constant<int, 2>{});
  if (rows < 4 * kMany) return run(std::integral_constant<int, kFew>{});
  run(std::integral_constant<int, kMany>{});
}

}  // namespace
