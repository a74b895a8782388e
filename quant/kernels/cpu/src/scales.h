// Knows how scales are chosen for groups of weights, L groups at a time, a lane each. Every value is
// that of quant/quantize.py to the last bit: the same operations in the same order.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

constexpr int kLargestGroup = 128;
constexpr float kTooLarge = 0x1p126f, kTooSmall = 0x1p-110f;

inline float round_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The bf16 value that lies `steps` further in the order of bits, as a 16-bit integer wraps.
inline float next_bf16(float x, int steps) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = static_cast<uint32_t>(static_cast<uint16_t>((bits >> 16) + steps)) << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline Vec::F load_as(const uint8_t* p, moecli::FloatType type, int64_t i) {
  if (type == moecli::kBfloat16) return Vec::load_bf16(p + 2 * i);
  if (type == moecli::kFloat16) return Vec::load_fp16(p + 2 * i);
  return Vec::load(reinterpret_cast<const float*>(p) + i);
}

// The sum over a group as a tree: halves are added until one value is left.
template <int g, int step = 1, class Term>
inline Vec::F tree(const Term& term, int first = 0) {
  if constexpr (step == g) {
    return term(first);
  } else {
    const Vec::F left = tree<g, 2 * step>(term, first);
    return Vec::add(left, tree<g, 2 * step>(term, first + step));
  }
}

template <int g>
struct Groups {
  static constexpr int L = Vec::L;
  alignas(64) float x[g * L];  // element, group
  alignas(64) float extreme[L], scale[L], least[L], other[L];
  float low, high;

  // False where a value is not finite, or too large.
  bool load(const uint8_t* weight, moecli::FloatType type, int64_t first, int count) {
    alignas(64) float rows[L * g] = {};  // group, element
    for (int k = 0; k < count; ++k) {
      for (int i = 0; i < g; i += L) {
        Vec::store(rows + k * g + i, load_as(weight, type, (first + k) * g + i));
      }
    }
    for (int i = 0; i < g; i += 4) {
      Vec::transpose(reinterpret_cast<const uint8_t*>(rows + i), 4 * g,
                     reinterpret_cast<uint8_t*>(x + i * L));
    }
    float top[L], bottom[L];
    bool fine[L];
    for (int k = 0; k < L; ++k) top[k] = bottom[k] = x[k], fine[k] = true;
    for (int j = 0; j < g; ++j) {
      for (int k = 0; k < L; ++k) {
        const float value = x[j * L + k];
        top[k] = value > top[k] ? value : top[k];
        bottom[k] = value < bottom[k] ? value : bottom[k];
        fine[k] = fine[k] & (value < kTooLarge) & (value > -kTooLarge);
      }
    }
    bool all = true;
    for (int k = 0; k < L; ++k) {
      const float found = top[k] >= -bottom[k] ? top[k] : bottom[k];
      const float magnitude = found < 0 ? -found : found;
      extreme[k] = magnitude < kTooSmall ? 1.0f : found;
      all &= fine[k];
    }
    return all;
  }

  Vec::F ratio(int j, Vec::F inverse) const { return Vec::mul(Vec::load(x + j * L), inverse); }

  // Bounds are integers, so it does not matter that they are applied before rounding.
  Vec::I code(Vec::F t) const {
    return Vec::round(Vec::max(Vec::min(t, Vec::repeat(high)), Vec::repeat(low)));
  }

  Vec::F inverse(const float* of) const { return Vec::div(Vec::repeat(1.0f), Vec::load(of)); }

  // Squared error of each group with these scales, in units of its squared extreme.
  Vec::F error(const float* scales) const {
    const Vec::F by = inverse(scales);
    const Vec::F left = tree<g>([&](int j) {
      const Vec::F t = ratio(j, by);
      const Vec::F d = Vec::sub(t, Vec::to_float(code(t)));
      return Vec::mul(d, d);
    });
    const Vec::F share = Vec::div(Vec::load(scales), Vec::load(extreme));
    return Vec::mul(left, Vec::mul(share, share));
  }

  // Take over `other` where it is better.
  void try_other() {
    float found[L];
    Vec::store(found, error(other));
    for (int k = 0; k < L; ++k) {
      const bool better = found[k] < least[k];
      scale[k] = better ? other[k] : scale[k];
      least[k] = better ? found[k] : least[k];
    }
  }

  void search(const moecli::ScaleSearch& s) {
    for (int k = 0; k < L; ++k) scale[k] = round_to_bf16(extreme[k] / s.quotients[0]);
    Vec::store(least, error(scale));
    for (int c = 1; c < s.count; ++c) {
      for (int k = 0; k < L; ++k) other[k] = round_to_bf16(extreme[k] / s.quotients[c]);
      try_other();
    }
    for (int step = s.first_step; step < s.end_step; ++step) {
      for (int k = 0; k < L; ++k) other[k] = next_bf16(round_to_bf16(extreme[k] / low), step);
      try_other();
    }
    if (s.bits == 4) refine();
  }

  // The scale of least squared error for the codes of the best one so far.
  void refine() {
    const Vec::F by = inverse(scale);
    float dot[L], square[L];
    Vec::store(dot, tree<g>([&](int j) {
                 const Vec::F t = ratio(j, by);
                 return Vec::mul(t, Vec::to_float(code(t)));
               }));
    Vec::store(square, tree<g>([&](int j) {
                 const Vec::F c = Vec::to_float(code(ratio(j, by)));
                 return Vec::mul(c, c);
               }));
    for (int k = 0; k < L; ++k) {
      other[k] = square[k] > 0 ? round_to_bf16(scale[k] * (dot[k] / square[k])) : scale[k];
    }
    try_other();
  }

  void store(const moecli::ScaleSearch& s, int64_t first, int count) const {
    alignas(64) int32_t codes[g * L];
    const Vec::F by = inverse(scale);
    for (int j = 0; j < g; ++j) {
      const Vec::I c = code(ratio(j, by));
      std::memcpy(codes + j * L, &c, sizeof c);
    }
    const int zero = s.bits == 4 ? 8 : 128;
    for (int k = 0; k < count; ++k) {
      uint8_t* out = s.packed + (first + k) * g * s.bits / 8;
      for (int j = 0; j < g; ++j) {
        const int c = codes[j * L + k] + zero;
        if (s.bits == 8) {
          out[j] = static_cast<uint8_t>(c);
        } else if (j % 2) {
          out[j / 2] |= static_cast<uint8_t>(c << 4);
        } else {
          out[j / 2] = static_cast<uint8_t>(c);
        }
      }
      uint32_t bits;
      std::memcpy(&bits, scale + k, 4);
      s.scale[first + k] = static_cast<uint16_t>(bits >> 16);
    }
    float errors[L], squares[L];
    Vec::store(errors, error(scale));
    const Vec::F one = inverse(extreme);
    Vec::store(squares, tree<g>([&](int j) {
                 const Vec::F t = ratio(j, one);
                 return Vec::mul(t, t);
               }));
    std::memcpy(s.errors + first, errors, static_cast<size_t>(count) * 4);
    std::memcpy(s.squares + first, squares, static_cast<size_t>(count) * 4);
    std::memcpy(s.extremes + first, extreme, static_cast<size_t>(count) * 4);
  }
};

template <int g>
bool search_groups(const moecli::ScaleSearch& s, int64_t begin, int64_t end) {
  Groups<g> groups;
  groups.low = s.bits == 4 ? -8.0f : -128.0f;
  groups.high = s.bits == 4 ? 7.0f : 127.0f;
  for (int64_t first = begin; first < end; first += Vec::L) {
    const int count = static_cast<int>(end - first < Vec::L ? end - first : Vec::L);
    if (!groups.load(s.weight, s.type, first, count)) return false;
    groups.search(s);
    groups.store(s, first, count);
  }
  return true;
}

bool search_scales(const moecli::ScaleSearch& s, int64_t begin, int64_t end) {
  if (s.group == 32) return search_groups<32>(s, begin, end);
  if (s.group == 64) return search_groups<64>(s, begin, end);
  return search_groups<kLargestGroup>(s, begin, end);
}

}  // namespace
