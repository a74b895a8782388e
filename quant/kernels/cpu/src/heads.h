// Knows norms, RoPE, and attention of one token's heads over slots of a cache, in vectors.
//
// Legend: D head size, P the same, rounded up to whole vectors, G query heads of a key head.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "floats.h"
#include "types.h"

namespace {

using moecli::from_bf16;
using moecli::KeptType;
using moecli::kSplit;
using moecli::Rope;
using moecli::Slots;

constexpr int64_t kAhead = 4096;  // bytes of a cache that are fetched before they are read

inline void rms_norm(const float* x, const float* weight, float eps, float* out, int64_t count) {
  const int64_t whole = count / Vec::L * Vec::L;
  Vec::F squares = Vec::zero();
  for (int64_t i = 0; i < whole; i += Vec::L) {
    const Vec::F value = Vec::load(x + i);
    squares = Vec::fma(value, value, squares);
  }
  float total = Vec::sum(squares);
  for (int64_t i = whole; i < count; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(count) + eps);
  if (weight) {
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
  }
}

// x [D] turned by D / 2 unit complex numbers.
inline void rotate(Rope rope, const float* turns, float* x, int64_t size) {
  const int64_t half = size / 2;
  const int64_t step = rope == moecli::kInterleaved ? 2 : 1;
  const int64_t other = rope == moecli::kInterleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float cos = turns[2 * i], sin = turns[2 * i + 1];
    float& first = x[i * step];
    float& second = x[i * step + other];
    const float a = first, b = second;
    first = a * cos - b * sin;
    second = b * cos + a * sin;
  }
}

// Rounds to nearest, ties to even.
inline void to_bf16(const float* x, uint8_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    const uint16_t half = static_cast<uint16_t>((nan ? bits | 0x400000 : rounded) >> 16);
    std::memcpy(out + 2 * i, &half, 2);
  }
}

// The largest becomes 127 or -127, as exactly as a scale in bf16 allows. What is no number makes a
// scale that is none.
inline void to_int8(const float* x, uint8_t* out, uint8_t* scale, int64_t count) {
  float most = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(x[i]);
    most = size > most || size != size ? size : most;
    if (most != most) break;
  }
  most /= 127.0f;
  to_bf16(&most, scale, 1);
  const float kept = from_bf16(scale), divisor = kept > 0.0f ? kept : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    float value = std::nearbyint(x[i] / divisor);
    value = value > -127.0f ? value : -127.0f;  // what is no number, too
    value = value < 127.0f ? value : 127.0f;
    out[i] = static_cast<uint8_t>(static_cast<int8_t>(value));
  }
}

inline void store_head(const float* x, KeptType type, uint8_t* out, uint8_t* scale,
                       int64_t count) {
  switch (type) {
    case moecli::kKeptFloat32: std::memcpy(out, x, static_cast<size_t>(count) * 4); return;
    case moecli::kKeptBfloat16: return to_bf16(x, out, count);
    case moecli::kKeptInt8: return to_int8(x, out, scale, count);
  }
}

template <int type>
struct Kept;
template <>
struct Kept<moecli::kKeptFloat32> : Floats<moecli::kFloat32> {};
template <>
struct Kept<moecli::kKeptBfloat16> : Floats<moecli::kBfloat16> {};
template <>
struct Kept<moecli::kKeptInt8> {
  static constexpr int kBytes = 1;
  static Vec::F load(const uint8_t* p) { return Vec::load_int8(p); }
};

// values [H, kSplit], of each head as many as slots, times the scales of these.
inline void scale_slots(const uint8_t* scales, int64_t count, int64_t group, float* values) {
  float factors[kSplit];
  for (int64_t i = 0; i < count; ++i) factors[i] = from_bf16(scales + 2 * i);
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t i = 0; i < count; ++i) values[h * kSplit + i] *= factors[i];
  }
}

// The last elements of a row, zeros behind them.
template <class W>
Vec::F load_some(const uint8_t* p, int64_t count) {
  uint8_t some[4 * Vec::L] = {};
  std::memcpy(some, p, static_cast<size_t>(count * W::kBytes));
  return W::load(some);
}

// Scores [H, kSplit] of queries [H, P]; as many slots at once as sums fill a vector.
template <class W, int H>
void score(const Slots& s, const float* q, int64_t padded, float* scores) {
  constexpr int S = Vec::L / H;
  const int64_t whole = s.size / Vec::L * Vec::L;
  for (int64_t slot = 0; slot < s.count; slot += S) {
    const uint8_t* key[S];
    for (int j = 0; j < S; ++j) {
      const int64_t at = slot + j < s.count ? slot + j : s.count - 1;
      key[j] = s.keys + at * s.size * W::kBytes;
    }
    Vec::F acc[Vec::L];
    for (Vec::F& one : acc) one = Vec::zero();
    for (int64_t i = 0; i < s.size; i += Vec::L) {
      Vec::F k[S];
      for (int j = 0; j < S; ++j) {
        const uint8_t* at = key[j] + i * W::kBytes;
        __builtin_prefetch(at + kAhead);
        k[j] = i < whole ? W::load(at) : load_some<W>(at, s.size - whole);
      }
      for (int h = 0; h < H; ++h) {
        const Vec::F value = Vec::load(q + h * padded + i);
        for (int j = 0; j < S; ++j) acc[h * S + j] = Vec::fma(value, k[j], acc[h * S + j]);
      }
    }
    float sums[Vec::L];
    Vec::store(sums, Vec::sums(acc));
    for (int h = 0; h < H; ++h) std::memcpy(scores + h * kSplit + slot, sums + h * S, 4 * S);
  }
}

// Scores become exp(score - most); zeros follow, up to a whole vector. A score that is no number
// stays one.
inline void soften(float* scores, int64_t count, float* most, float* total) {
  const int64_t whole = (count + Vec::L - 1) / Vec::L * Vec::L;
  for (int64_t i = count; i < whole; ++i) scores[i] = scores[count - 1];
  Vec::F largest = Vec::load(scores);
  for (int64_t i = Vec::L; i < whole; i += Vec::L) largest = Vec::max(largest, Vec::load(scores + i));
  float lanes[Vec::L];
  Vec::store(lanes, largest);
  *most = lanes[0];
  for (const float lane : lanes) *most = lane > *most ? lane : *most;
  for (int64_t i = 0; i < whole; i += Vec::L) {
    const Vec::F less = Vec::sub(Vec::load(scores + i), Vec::repeat(*most));
    Vec::store(scores + i, Vec::fma(less, Vec::zero(), exp(less)));
  }
  for (int64_t i = count; i < whole; ++i) scores[i] = 0.0f;
  Vec::F sum = Vec::zero();
  for (int64_t i = 0; i < whole; i += Vec::L) sum = Vec::add(sum, Vec::load(scores + i));
  *total = Vec::sum(sum);
}

// out [H, P], R vectors of it from element `at`, += weights [H, kSplit] times values.
template <class W, int H, int R>
void mix_part(const Slots& s, const float* weights, int64_t first, int64_t last, int64_t at,
              int64_t padded, float* out) {
  Vec::F acc[H][R];
  for (int h = 0; h < H; ++h) {
    for (int r = 0; r < R; ++r) acc[h][r] = Vec::load(out + h * padded + at + r * Vec::L);
  }
  const int64_t left = s.size - at;
  for (int64_t slot = first; slot < last; ++slot) {
    const uint8_t* value = s.values + (slot * s.size + at) * W::kBytes;
    Vec::F v[R];
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(value + r * Vec::L * W::kBytes + kAhead);
      v[r] = R > 1 || left >= Vec::L ? W::load(value + r * Vec::L * W::kBytes)
                                     : load_some<W>(value, left);
    }
    for (int h = 0; h < H; ++h) {
      const Vec::F weight = Vec::repeat(weights[h * kSplit + slot]);
      for (int r = 0; r < R; ++r) acc[h][r] = Vec::fma(weight, v[r], acc[h][r]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int r = 0; r < R; ++r) Vec::store(out + h * padded + at + r * Vec::L, acc[h][r]);
  }
}

template <class W, int H>
void mix(const Slots& s, const float* weights, int64_t first, int64_t last, int64_t padded,
         float* out) {
  constexpr int R = Vec::L / 4;
  int64_t at = 0;
  for (; at + R * Vec::L <= s.size; at += R * Vec::L) {
    mix_part<W, H, R>(s, weights, first, last, at, padded, out);
  }
  for (; at < s.size; at += Vec::L) mix_part<W, H, 1>(s, weights, first, last, at, padded, out);
}

// Calls visit(first head, std::integral_constant of how many: 4, 2 or 1).
template <class Visit>
void by_heads(int64_t group, Visit visit) {
  int64_t h = 0;
  for (; h + 4 <= group; h += 4) visit(h, std::integral_constant<int, 4>());
  if (h + 2 <= group) visit(h, std::integral_constant<int, 2>()), h += 2;
  if (h < group) visit(h, std::integral_constant<int, 1>());
}

template <int type>
void attend_of(const Slots& s, const float* q, int64_t group, float* out, float* most,
               float* total, float* scores) {
  using W = Kept<type>;
  constexpr bool kScaled = type == moecli::kKeptInt8;
  constexpr int64_t kBlock = 64;  // slots whose values stay in the first cache for all heads
  const int64_t padded = moecli::padded_size(s.size);
  by_heads(group, [&](int64_t h, auto count) {
    score<W, decltype(count)::value>(s, q + h * padded, padded, scores + h * kSplit);
  });
  if (kScaled) scale_slots(s.key_scales, s.count, group, scores);
  for (int64_t h = 0; h < group; ++h) soften(scores + h * kSplit, s.count, most + h, total + h);
  if (kScaled) scale_slots(s.value_scales, s.count, group, scores);
  std::memset(out, 0, static_cast<size_t>(group * padded) * 4);
  for (int64_t first = 0; first < s.count; first += kBlock) {
    const int64_t last = first + kBlock < s.count ? first + kBlock : s.count;
    by_heads(group, [&](int64_t h, auto count) {
      mix<W, decltype(count)::value>(s, scores + h * kSplit, first, last, padded,
                                     out + h * padded);
    });
  }
}

inline void attend(const Slots& s, const float* q, int64_t group, float* out, float* most,
                   float* total, float* scores) {
  switch (s.type) {
    case moecli::kKeptFloat32:
      return attend_of<moecli::kKeptFloat32>(s, q, group, out, most, total, scores);
    case moecli::kKeptBfloat16:
      return attend_of<moecli::kKeptBfloat16>(s, q, group, out, most, total, scores);
    case moecli::kKeptInt8:
      return attend_of<moecli::kKeptInt8>(s, q, group, out, most, total, scores);
  }
}

}  // namespace
