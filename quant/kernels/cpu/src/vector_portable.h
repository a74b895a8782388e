// Knows vectors as short arrays, for any processor; loops are such as compilers vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

struct Vec {
  static constexpr int L = 8;
  static constexpr int kWide = 1;   // tiles at once
  static constexpr int kBlock = 4;
  struct F {
    float v[L];
  };
  struct I {
    int32_t v[L];
  };
  struct B {
    uint8_t v[4 * L];
  };

  template <class Function>
  static F each(Function function) {
    F out;
    for (int i = 0; i < L; ++i) out.v[i] = function(i);
    return out;
  }

  static B load_bytes(const uint8_t* p) {
    B out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static B load_bytes(const uint8_t* p, int64_t n) {
    B out = {};
    std::memcpy(out.v, p, static_cast<size_t>(n));
    return out;
  }
  static B repeat_4_bytes(const uint8_t* p) {
    B out;
    for (int i = 0; i < 4 * L; ++i) out.v[i] = p[i % 4];
    return out;
  }
  static B low_nibbles(B b) {
    for (int i = 0; i < 4 * L; ++i) b.v[i] &= 15;
    return b;
  }
  static B high_nibbles(B b) {
    for (int i = 0; i < 4 * L; ++i) b.v[i] >>= 4;
    return b;
  }

  template <class V>
  static V keep(V value) {
    return value;
  }

  static F zero() { return F{}; }
  static F repeat(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float* p) {
    F out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(F a, F b, F c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F where_less(F a, F b, F less, F other) {
    return each([&](int i) { return a.v[i] < b.v[i] ? less.v[i] : other.v[i]; });
  }
  static float sum(F a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
  }
  static F sums(const F (&a)[L]) {
    return each([&](int i) { return sum(a[i]); });
  }

  static I load_ints(const uint8_t* p) {
    I out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static void store_ints(int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
  static I repeat_int(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    I out;
    for (int i = 0; i < L; ++i) out.v[i] = value;
    return out;
  }
  static F to_float(I a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static I round(F a) {
    I out;
    for (int i = 0; i < L; ++i) out.v[i] = static_cast<int32_t>(std::lrintf(a.v[i]));
    return out;
  }
  static float from_bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  static F power_of_2(I a) {
    return each([&](int i) { return from_bits(static_cast<uint32_t>(a.v[i] + 127) << 23); });
  }

  // 16-bit integers, two a lane. A product is divided by 2^15, and rounded; an addition ends where
  // 16 bits end.
  template <class Function>
  static I each_16(I a, I b, Function function) {
    int16_t x[2 * L], y[2 * L];
    std::memcpy(x, a.v, sizeof x);
    std::memcpy(y, b.v, sizeof y);
    for (int i = 0; i < 2 * L; ++i) x[i] = static_cast<int16_t>(function(x[i], y[i]));
    std::memcpy(a.v, x, sizeof x);
    return a;
  }
  static int within_16(int a) { return a < -32768 ? -32768 : a > 32767 ? 32767 : a; }
  static I pair(I low, I high) {
    int16_t out[2 * L];
    for (int i = 0; i < L; ++i) {
      out[2 * i] = static_cast<int16_t>(low.v[i]);
      out[2 * i + 1] = static_cast<int16_t>(high.v[i]);
    }
    std::memcpy(low.v, out, sizeof out);
    return low;
  }
  static I repeat_16(int value) {
    I one;
    for (int i = 0; i < L; ++i) one.v[i] = value;
    return pair(one, one);
  }
  static I mul_16(I a, I b) {
    return each_16(a, b, [](int x, int y) { return (x * y + (1 << 14)) >> 15; });
  }
  static I add_16(I a, I b) {
    return each_16(a, b, [](int x, int y) { return within_16(x + y); });
  }
  static I sub_16(I a, I b) {
    return each_16(a, b, [](int x, int y) { return x - y; });
  }
  static I min_16(I a, I b) {
    return each_16(a, b, [](int x, int y) { return x < y ? x : y; });
  }
  static I max_16(I a, I b) {
    return each_16(a, b, [](int x, int y) { return x > y ? x : y; });
  }
  static I and_bits(I a, I b) {
    return each_16(a, b, [](int x, int y) { return x & y; });
  }
  template <int n>
  static I shift_16(I a) {
    return each_16(a, a, [](int x, int) { return x >> n; });
  }
  // sum + the products of both
  static I dot_16(I sum, I a, I b) {
    int16_t x[2 * L], y[2 * L];
    std::memcpy(x, a.v, sizeof x);
    std::memcpy(y, b.v, sizeof y);
    for (int i = 0; i < L; ++i) {
      sum.v[i] += int32_t(x[2 * i]) * y[2 * i] + int32_t(x[2 * i + 1]) * y[2 * i + 1];
    }
    return sum;
  }

  template <int n>
  static F spread_bf16(const uint8_t* p) {
    return each([&](int i) { return moecli::from_bf16(p + 2 * (i * n / L)); });
  }
  // Of 2 bf16 values in each lane one.
  static F low_bf16(I pair) {
    return each([&](int i) { return from_bits(static_cast<uint32_t>(pair.v[i]) << 16); });
  }
  static F high_bf16(I pair) {
    return each([&](int i) { return from_bits(static_cast<uint32_t>(pair.v[i]) & 0xffff0000); });
  }
  // L values that follow each other.
  static F load_bf16(const uint8_t* p) {
    return each([&](int i) { return moecli::from_bf16(p + 2 * i); });
  }
  static F load_int8(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
  }
  static F load_fp16(const uint8_t* p) {
    return each([&](int i) { return fp16(p + 2 * i); });
  }
  static float fp16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    const uint32_t sign = uint32_t(value & 0x8000) << 16, rest = value & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // As an exponent that is 112 too small; subnormal numbers come right by the product.
    return from_bits(sign | rest << 13) * 0x1p112f;
  }

  // out[i * L + r] = 4 bytes i of row r, for 16 bytes of L rows.
  static void transpose(const uint8_t* rows, int64_t stride, uint8_t* out) {
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < L; ++r) std::memcpy(out + 4 * (i * L + r), rows + r * stride + 4 * i, 4);
    }
  }

  template <int bits>
  struct Dot {
    static constexpr int kExcess = 1 << (bits - 1);
    using Acc = I;
    using W = B;
    static W codes(B b) { return b; }
    static Acc start(I offset) { return offset; }
    static Acc add(Acc acc, const W& w, const B& x) {
      for (int i = 0; i < L; ++i) {
        int32_t sum = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j) sum += int32_t(w.v[j]) * int8_t(x.v[j]);
        acc.v[i] += sum;
      }
      return acc;
    }
    static I finish(Acc acc, I) { return acc; }
  };
};

}  // namespace
