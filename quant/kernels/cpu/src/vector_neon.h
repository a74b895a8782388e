// Knows vectors as pairs of NEON registers, which every 64-bit ARM processor has. Included by files
// that compile for one instruction set; with that of dot products it uses them.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

struct Vec {
  static constexpr int L = 8;
  static constexpr int kWide = 1;   // tiles at once
  static constexpr int kBlock = 4;
  struct F {
    float32x4_t a, b;
  };
  struct I {
    int32x4_t a, b;
  };
  struct B {
    uint8x16_t a, b;
  };

  static B load_bytes(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
  static B load_bytes(const uint8_t* p, int64_t n) {
    uint8_t some[32] = {};
    std::memcpy(some, p, static_cast<size_t>(n));
    return load_bytes(some);
  }
  static B repeat_4_bytes(const uint8_t* p) {
    uint32_t value;
    std::memcpy(&value, p, 4);
    const uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(value));
    return {four, four};
  }
  static B low_nibbles(B x) {
    const uint8x16_t mask = vdupq_n_u8(15);
    return {vandq_u8(x.a, mask), vandq_u8(x.b, mask)};
  }
  static B high_nibbles(B x) { return {vshrq_n_u8(x.a, 4), vshrq_n_u8(x.b, 4)}; }

  template <class V>
  static V keep(V value) {
    return value;
  }

  static F zero() { return repeat(0.0f); }
  static F repeat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
  }
  static F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  static F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  static F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  static F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
  // The second where one is not a number, as on other processors.
  static F min(F x, F y) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcltq_f32(x.b, y.b), x.b, y.b)};
  }
  static F max(F x, F y) {
    return {vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b)};
  }
  static F where_less(F x, F y, F less, F other) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), less.a, other.a),
            vbslq_f32(vcltq_f32(x.b, y.b), less.b, other.b)};
  }
  static float sum(F x) { return vaddvq_f32(vaddq_f32(x.a, x.b)); }
  static F sums(const F (&x)[L]) {
    float out[L];
    for (int i = 0; i < L; ++i) out[i] = sum(x[i]);
    return load(out);
  }

  static I ints(B x) { return {vreinterpretq_s32_u8(x.a), vreinterpretq_s32_u8(x.b)}; }
  static F floats(uint32x4_t a, uint32x4_t b) {
    return {vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b)};
  }
  static I load_ints(const uint8_t* p) { return ints(load_bytes(p)); }
  static void store_ints(int32_t* p, I x) {
    vst1q_s32(p, x.a);
    vst1q_s32(p + 4, x.b);
  }
  static I repeat_int(const uint8_t* p) { return ints(repeat_4_bytes(p)); }
  static F to_float(I x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
  static I round(F x) { return {vcvtnq_s32_f32(x.a), vcvtnq_s32_f32(x.b)}; }
  static F power_of_2(I x) {
    const int32x4_t bias = vdupq_n_s32(127);
    const auto power = [&](int32x4_t e) {
      return vreinterpretq_u32_s32(vshlq_n_s32(vaddq_s32(e, bias), 23));
    };
    return floats(power(x.a), power(x.b));
  }

  // 16-bit integers, two a lane. A product is divided by 2^15, and rounded; an addition ends where
  // 16 bits end.
  template <class Function>
  static I each_16(I x, I y, Function function) {
    const auto one = [&](int32x4_t s, int32x4_t t) {
      return vreinterpretq_s32_s16(function(vreinterpretq_s16_s32(s), vreinterpretq_s16_s32(t)));
    };
    return {one(x.a, y.a), one(x.b, y.b)};
  }
  static I pair(I low, I high) {
    return {vsliq_n_s32(low.a, high.a, 16), vsliq_n_s32(low.b, high.b, 16)};
  }
  static I repeat_16(int value) {
    const int32x4_t all = vreinterpretq_s32_s16(vdupq_n_s16(static_cast<int16_t>(value)));
    return {all, all};
  }
  static I mul_16(I x, I y) {
    return each_16(x, y, [](int16x8_t s, int16x8_t t) { return vqrdmulhq_s16(s, t); });
  }
  static I add_16(I x, I y) {
    return each_16(x, y, [](int16x8_t s, int16x8_t t) { return vqaddq_s16(s, t); });
  }
  static I sub_16(I x, I y) {
    return each_16(x, y, [](int16x8_t s, int16x8_t t) { return vsubq_s16(s, t); });
  }
  static I min_16(I x, I y) {
    return each_16(x, y, [](int16x8_t s, int16x8_t t) { return vminq_s16(s, t); });
  }
  static I max_16(I x, I y) {
    return each_16(x, y, [](int16x8_t s, int16x8_t t) { return vmaxq_s16(s, t); });
  }
  static I and_bits(I x, I y) { return {vandq_s32(x.a, y.a), vandq_s32(x.b, y.b)}; }
  template <int n>
  static I shift_16(I x) {
    return each_16(x, x, [](int16x8_t s, int16x8_t) { return vshrq_n_s16(s, n); });
  }
  // sum + the products of both
  static I dot_16(I sum, I x, I y) {
    const auto one = [](int32x4_t to, int32x4_t s, int32x4_t t) {
      const int16x8_t p = vreinterpretq_s16_s32(s), q = vreinterpretq_s16_s32(t);
      const int32x4_t low = vmull_s16(vget_low_s16(p), vget_low_s16(q));
      return vaddq_s32(to, vpaddq_s32(low, vmull_high_s16(p, q)));
    };
    return {one(sum.a, x.a, y.a), one(sum.b, x.b, y.b)};
  }

  // n values, each in L / n lanes that follow each other.
  template <int n>
  static F spread_bf16(const uint8_t* p) {
    if constexpr (n == 8) return load_bf16(p);
    if constexpr (n == 1) return repeat(moecli::from_bf16(p));
    if constexpr (n == 2) {
      return {vdupq_n_f32(moecli::from_bf16(p)), vdupq_n_f32(moecli::from_bf16(p + 2))};
    }
    float out[L];
    for (int i = 0; i < L; ++i) out[i] = moecli::from_bf16(p + 2 * (i * n / L));
    return load(out);
  }
  // Of 2 bf16 values in each lane one.
  static F low_bf16(I pair) {
    return floats(vshlq_n_u32(vreinterpretq_u32_s32(pair.a), 16),
                  vshlq_n_u32(vreinterpretq_u32_s32(pair.b), 16));
  }
  static F high_bf16(I pair) {
    const uint32x4_t mask = vdupq_n_u32(0xffff0000);
    return floats(vandq_u32(vreinterpretq_u32_s32(pair.a), mask),
                  vandq_u32(vreinterpretq_u32_s32(pair.b), mask));
  }
  // L values that follow each other.
  static uint16x8_t load_halves(const uint8_t* p) { return vreinterpretq_u16_u8(vld1q_u8(p)); }
  static F load_bf16(const uint8_t* p) {
    const uint16x8_t x = load_halves(p);
    return floats(vshll_n_u16(vget_low_u16(x), 16), vshll_n_u16(vget_high_u16(x), 16));
  }
  static F load_int8(const uint8_t* p) {
    const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)))};
  }
  static F load_fp16(const uint8_t* p) {
    const float16x8_t x = vreinterpretq_f16_u16(load_halves(p));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_f32_f16(vget_high_f16(x))};
  }

  // out[i * L + r] = 4 bytes i of row r, for 16 bytes of L rows.
  static void transpose(const uint8_t* rows, int64_t stride, uint8_t* out) {
    for (int half = 0; half < 2; ++half, rows += 4 * stride, out += 16) {
      const auto row = [&](int r) { return vreinterpretq_u32_u8(vld1q_u8(rows + r * stride)); };
      const uint32x4x2_t even = vtrnq_u32(row(0), row(1)), odd = vtrnq_u32(row(2), row(3));
      const auto put = [&](int word, uint32x2_t first, uint32x2_t second) {
        vst1q_u8(out + word * 4 * L, vreinterpretq_u8_u32(vcombine_u32(first, second)));
      };
      put(0, vget_low_u32(even.val[0]), vget_low_u32(odd.val[0]));
      put(1, vget_low_u32(even.val[1]), vget_low_u32(odd.val[1]));
      put(2, vget_high_u32(even.val[0]), vget_high_u32(odd.val[0]));
      put(3, vget_high_u32(even.val[1]), vget_high_u32(odd.val[1]));
    }
  }

  // 8 bits: less 128, weights have signs, as the instructions want them; nothing is in excess.
  template <int bits>
  struct Dot {
    static constexpr int kExcess = bits == 4 ? 8 : 0;
    using Acc = I;
    struct W {
      int8x16_t a, b;
    };
    static W codes(B x) {
      if constexpr (bits == 8) {
        const uint8x16_t sign = vdupq_n_u8(128);
        x = {veorq_u8(x.a, sign), veorq_u8(x.b, sign)};
      }
      return {vreinterpretq_s8_u8(x.a), vreinterpretq_s8_u8(x.b)};
    }
    static Acc start(I offset) { return offset; }
    static Acc add(Acc acc, W w, B x) {
      return {add(acc.a, w.a, vreinterpretq_s8_u8(x.a)), add(acc.b, w.b, vreinterpretq_s8_u8(x.b))};
    }
    static I finish(Acc acc, I) { return acc; }

    // To each lane the products of 4 bytes.
    static int32x4_t add(int32x4_t acc, int8x16_t w, int8x16_t x) {
#ifdef __ARM_FEATURE_DOTPROD
      return vdotq_s32(acc, w, x);
#else
      const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
      return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
    }
  };
};

}  // namespace
