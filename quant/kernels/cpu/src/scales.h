// Knows how scales are chosen for groups of weights, L groups at a time, a lane each. Every value is
// that of quant/quantize.py to the last bit: sums are of integers, or trees of the same additions.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

constexpr int kLargestGroup = 128;
constexpr float kTooLarge = 0x1p126f, kTooSmall = 0x1p-110f;
constexpr int kExtreme = 32767;             // a group's extreme as an integer is -kExtreme
constexpr int kUnit4 = 2048, kUnit8 = 128;  // of a code, in integers that are not yet rounded

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

// The sum over a group as a tree: halves are added until one value is left. A leaf, pair(i), is the
// sum of elements i and i + g / 2.
template <int g, int step = 1, class Pair>
inline Vec::F tree(const Pair& pair, int first = 0) {
  if constexpr (2 * step == g) {
    return pair(first);
  } else {
    const Vec::F left = tree<g, 2 * step>(pair, first);
    return Vec::add(left, tree<g, 2 * step>(pair, first + step));
  }
}

template <int g>
struct Groups {
  static constexpr int L = Vec::L;
  using F = Vec::F;
  using I = Vec::I;

  alignas(64) float x[g * L];            // element, group
  alignas(64) int32_t pairs[g / 2 * L];  // two elements as 16-bit integers, group
  alignas(64) float extreme[L], scale[L], squares[L], left[L];
  alignas(64) int32_t codes[g * L];
  float low, high;

  // False where a value is not finite, or too large.
  bool load(const uint8_t* weight, moecli::FloatType type, int64_t first, int count) {
    if (type == moecli::kBfloat16) {
      load_bf16(weight + 2 * g * first, count);
    } else {
      load_floats(weight, type, first, count);
    }
    F top = Vec::load(x), bottom = top;
    for (int j = 1; j < g; ++j) {
      top = Vec::max(top, Vec::load(x + j * L));
      bottom = Vec::min(bottom, Vec::load(x + j * L));
    }
    const F below = Vec::sub(Vec::zero(), bottom);
    const F found = Vec::where_less(top, below, bottom, top);
    const F size = Vec::max(top, below);
    Vec::store(extreme, Vec::where_less(size, Vec::repeat(kTooSmall), Vec::repeat(1.0f), found));
    take_integers();
    // A maximum may lose what is not a number; a sum of squares, at most 1 each, does not.
    float sizes[L];
    Vec::store(sizes, size);
    bool fine = true;
    for (int k = 0; k < L; ++k) {
      fine &= (sizes[k] < kTooLarge) & (squares[k] < 2.0f * g * kExtreme * kExtreme);
    }
    return fine;
  }

  void load_bf16(const uint8_t* weight, int count) {
    alignas(64) uint8_t some[2 * g * L];
    if (count < L) {
      std::memset(some, 0, sizeof some);
      std::memcpy(some, weight, static_cast<size_t>(2 * g * count));
      weight = some;
    }
    alignas(64) uint8_t four[4 * 4 * L];
    for (int j = 0; j < g; j += 8) {
      Vec::transpose(weight + 2 * j, 2 * g, four);
      for (int i = 0; i < 4; ++i) {
        const I two = Vec::load_ints(four + 4 * i * L);
        Vec::store(x + (j + 2 * i) * L, Vec::low_bf16(two));
        Vec::store(x + (j + 2 * i + 1) * L, Vec::high_bf16(two));
      }
    }
  }

  void load_floats(const uint8_t* weight, moecli::FloatType type, int64_t first, int count) {
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
  }

  // Elements in units of extreme / -kExtreme, and the sum of their squares before rounding.
  void take_integers() {
    const F by = Vec::div(Vec::repeat(-kExtreme), Vec::load(extreme));
    Vec::store(squares, tree<g>([&](int j) {
                 const F a = ratio(j, by), b = ratio(j + g / 2, by);
                 Vec::store_ints(pairs + j * L, Vec::pair(Vec::round(a), Vec::round(b)));
                 return Vec::add(Vec::mul(a, a), Vec::mul(b, b));
               }));
  }

  F ratio(int j, F inverse) const { return Vec::mul(Vec::load(x + j * L), inverse); }

  // Bounds are integers, so it does not matter that they are applied before rounding.
  I code(F t) const {
    return Vec::round(Vec::max(Vec::min(t, Vec::repeat(high)), Vec::repeat(low)));
  }

  // Sum of squares of what rounding x / scale leaves, of each group; takes the codes.
  F squares_left(const float* scales) {
    const F by = Vec::div(Vec::repeat(1.0f), Vec::load(scales));
    const auto square = [&](int j) {
      const F t = ratio(j, by);
      const I c = code(t);
      Vec::store_ints(codes + j * L, c);
      const F d = Vec::sub(t, Vec::to_float(c));
      return Vec::mul(d, d);
    };
    return tree<g>([&](int j) {
      const F first = square(j);
      return Vec::add(first, square(j + g / 2));
    });
  }

  // (scale / extreme)^2
  F weight_of(const float* scales) const {
    const F share = Vec::div(Vec::load(scales), Vec::load(extreme));
    return Vec::mul(share, share);
  }

  // What makes codes in parts of `unit` of elements as integers: 16-bit factors, 2 a lane.
  I factors(const float* scales, int unit) const {
    const F quotient = Vec::div(Vec::load(extreme), Vec::load(scales));
    const I one = Vec::round(Vec::mul(quotient, Vec::repeat(static_cast<float>(-unit))));
    return Vec::pair(one, one);
  }

  I two(int j) const { return Vec::load_ints(reinterpret_cast<const uint8_t*>(pairs + j * L)); }

  // Of codes found with these factors: the sum of products with elements, and of their squares.
  void fit(I by, F& dot, F& square) const {
    const I half = Vec::repeat_16(kUnit4);
    I dots = Vec::repeat_16(0), square_sums = dots;
    for (int j = 0; j < g / 2; ++j) {
      const I element = two(j);
      const I t = Vec::mul_16(element, by);
      // Twice that ends where 16 bits end: at codes -8 and 8, and half a code more at 7.
      const I q = Vec::shift_16<12>(Vec::add_16(Vec::add_16(t, t), half));
      dots = Vec::dot_16(dots, element, q);
      square_sums = Vec::dot_16(square_sums, q, q);
    }
    dot = Vec::to_float(dots);
    square = Vec::to_float(square_sums);
  }

  // Codes of quotients, each with the scale that fits them best: dot / square, which leaves
  // squares - dot^2 / square. The first is plain rounding, whose scale has its own error.
  void search_4(const moecli::ScaleSearch& s) {
    alignas(64) float plain[L];
    for (int k = 0; k < L; ++k) plain[k] = round_to_bf16(extreme[k] / -7.0f);
    F dot, square;
    fit(factors(plain, kUnit4), dot, square);
    const F unit = Vec::mul(Vec::load(extreme), Vec::repeat(-1.0f / kExtreme));
    const F all = Vec::load(squares), width = Vec::div(Vec::load(plain), unit);
    const F crossed = Vec::mul(Vec::add(width, width), dot);
    const F plain_error = Vec::add(Vec::sub(all, crossed), Vec::mul(Vec::mul(width, width), square));
    F gain = Vec::mul(dot, dot);
    for (int c = 0; c < s.count; ++c) {
      F other, other_square;
      fit(Vec::repeat_16(s.factors[c]), other, other_square);
      const F other_gain = Vec::mul(other, other);
      const F a = Vec::mul(gain, other_square), b = Vec::mul(other_gain, square);
      gain = Vec::where_less(a, b, other_gain, gain);
      dot = Vec::where_less(a, b, other, dot);
      square = Vec::where_less(a, b, other_square, square);
    }
    // A group of zeros has the scale 1.
    const F best = Vec::mul(Vec::div(dot, square), unit);
    Vec::store(scale, Vec::where_less(Vec::zero(), square, best, Vec::repeat(1.0f)));
    for (int k = 0; k < L; ++k) scale[k] = round_to_bf16(scale[k]);
    const F limit = Vec::add(Vec::mul(Vec::sub(all, Vec::div(gain, square)), Vec::repeat(1.0078125f)),
                             Vec::mul(all, Vec::repeat(0x1p-16f)));
    compare(plain, plain_error, limit);
  }

  // Scales as bf16 has them around extreme / -128: what counts is the luck of the grid.
  void search_8(const moecli::ScaleSearch& s) {
    alignas(64) float plain[L], middle[L], other[L];
    for (int k = 0; k < L; ++k) {
      scale[k] = plain[k] = round_to_bf16(extreme[k] / 127.0f);
      middle[k] = round_to_bf16(extreme[k] / -128.0f);
    }
    const F plain_error = residue(plain);
    F least = plain_error;
    for (int step = s.first_step; step < s.end_step; ++step) {
      for (int k = 0; k < L; ++k) other[k] = next_bf16(middle[k], step);
      const F error = residue(other);
      Vec::store(scale, Vec::where_less(error, least, Vec::load(other), Vec::load(scale)));
      least = Vec::where_less(error, least, error, least);
    }
    const F limit = Vec::add(Vec::mul(least, Vec::repeat(1.0625f)),
                             Vec::mul(weight_of(plain), Vec::repeat(2.0f * g)));
    compare(plain, plain_error, limit);
  }

  // As squares_left times weight_of, from integers: in parts of kUnit8^2.
  F residue(const float* scales) const {
    const I by = factors(scales, kUnit8);
    const I least = Vec::repeat_16(-128 * kUnit8), most = Vec::repeat_16(127 * kUnit8);
    const I half = Vec::repeat_16(kUnit8 / 2), whole = Vec::repeat_16(-kUnit8);
    I sum = Vec::repeat_16(0);
    for (int j = 0; j < g / 2; ++j) {
      const I t = Vec::mul_16(two(j), by);
      const I within = Vec::max_16(Vec::min_16(t, most), least);
      const I d = Vec::sub_16(t, Vec::and_bits(Vec::add_16(within, half), whole));
      sum = Vec::dot_16(sum, d, d);
    }
    return Vec::mul(Vec::to_float(sum), weight_of(scales));
  }

  // Integers are right to some part of an error: where plain rounding may be better, floats decide.
  void compare(const float* plain, F plain_error, F limit) {
    float near[L];
    Vec::store(near, Vec::where_less(plain_error, limit, Vec::repeat(1.0f), Vec::zero()));
    bool any = false;
    for (int k = 0; k < L; ++k) any |= near[k] != 0;
    if (!any) return;
    const F theirs = Vec::mul(squares_left(plain), weight_of(plain));
    const F ours = Vec::mul(squares_left(scale), weight_of(scale));
    const F chosen = Vec::where_less(theirs, ours, Vec::load(plain), Vec::load(scale));
    Vec::store(scale, Vec::where_less(plain_error, limit, chosen, Vec::load(scale)));
  }

  void store(const moecli::ScaleSearch& s, int64_t first, int count) {
    Vec::store(left, squares_left(scale));
    const int words = g * s.bits / 32;
    alignas(64) uint32_t packed[g / 4 * L];  // word, group
    if (s.bits == 4) {
      pack<4>(packed);
    } else {
      pack<8>(packed);
    }
    for (int k = 0; k < count; ++k) {
      uint8_t* out = s.packed + (first + k) * words * 4;
      for (int w = 0; w < words; ++w) std::memcpy(out + 4 * w, packed + w * L + k, 4);
      uint32_t bits;
      std::memcpy(&bits, scale + k, 4);
      s.scale[first + k] = static_cast<uint16_t>(bits >> 16);
    }
    double errors[L], totals[L];
    for (int k = 0; k < L; ++k) {
      const double by = scale[k], unit = static_cast<double>(extreme[k]) / kExtreme;
      errors[k] = left[k] * (by * by);
      totals[k] = squares[k] * (unit * unit);
    }
    int64_t row = first / s.row_groups, group = first % s.row_groups;
    for (int k = 0; k < count; ++k) {
      s.row_errors[row] += errors[k];
      s.row_squares[row] += totals[k];
      if (++group == s.row_groups) ++row, group = 0;
    }
  }

  template <int bits>
  void pack(uint32_t* packed) const {
    constexpr int each = 32 / bits;
    for (int w = 0; w < g / each; ++w) {
      for (int k = 0; k < L; ++k) {
        uint32_t word = 0;
        for (int i = 0; i < each; ++i) {
          const int32_t c = codes[(w * each + i) * L + k] + (1 << (bits - 1));
          word |= static_cast<uint32_t>(c) << (bits * i);
        }
        packed[w * L + k] = word;
      }
    }
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
    if (s.bits == 4) {
      groups.search_4(s);
    } else {
      groups.search_8(s);
    }
    groups.store(s, first, count);
  }
  return true;
}

bool search_scales(const moecli::ScaleSearch& s, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) s.row_errors[row] = s.row_squares[row] = 0;
  const int64_t begin = first_row * s.row_groups, end = end_row * s.row_groups;
  if (s.group == 32) return search_groups<32>(s, begin, end);
  if (s.group == 64) return search_groups<64>(s, begin, end);
  return search_groups<kLargestGroup>(s, begin, end);
}

}  // namespace
