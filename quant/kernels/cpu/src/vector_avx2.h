// Knows vectors of 256 bits with AVX2 and FMA, and with AVX-VNNI where the compiler may use it.
// Included by one file for each of the two.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Vec {
  static constexpr int L = 8;  // 32-bit lanes
  static constexpr int kWide = 1;   // tiles at once
  static constexpr int kBlock = 4;  // tokens of a block that fit the registers
  using F = __m256;
  using I = __m256i;
  using B = __m256i;  // 4 bytes a lane

  static B load_bytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static B load_bytes(const uint8_t* p, int64_t n) {
    uint8_t whole[32] = {};
    std::memcpy(whole, p, static_cast<size_t>(n));
    return load_bytes(whole);
  }
  static B repeat_4_bytes(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
  }
  static B low_nibbles(B b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
  static B high_nibbles(B b) {
    return _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(15));
  }

  // Loads are what these kernels run out of: what is used twice stays in a register.
  template <class V>
  static V keep(V value) {
    asm("" : "+x"(value));
    return value;
  }

  static F zero() { return _mm256_setzero_ps(); }
  static F repeat(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F where_less(F a, F b, F less, F other) {
    return _mm256_blendv_ps(other, less, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  // Lane i: the sum of vector i.
  static F sums(const F (&a)[L]) {
    const auto four = [&](int i) {
      return _mm256_hadd_ps(_mm256_hadd_ps(a[i], a[i + 1]), _mm256_hadd_ps(a[i + 2], a[i + 3]));
    };
    const F low = four(0), high = four(4);
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }

  static I load_ints(const uint8_t* p) { return load_bytes(p); }
  static void store_ints(int32_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
  }
  static I repeat_int(const uint8_t* p) { return repeat_4_bytes(p); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I round(F a) { return _mm256_cvtps_epi32(a); }
  static F power_of_2(I a) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(a, _mm256_set1_epi32(127)), 23));
  }

  // 16-bit integers, two a lane. A product is divided by 2^15, and rounded; an addition ends where
  // 16 bits end.
  static I pair(I low, I high) {
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
  }
  static I repeat_16(int value) { return _mm256_set1_epi16(short(value)); }
  static I mul_16(I a, I b) { return _mm256_mulhrs_epi16(a, b); }
  static I add_16(I a, I b) { return _mm256_adds_epi16(a, b); }
  static I sub_16(I a, I b) { return _mm256_sub_epi16(a, b); }
  static I min_16(I a, I b) { return _mm256_min_epi16(a, b); }
  static I max_16(I a, I b) { return _mm256_max_epi16(a, b); }
  static I and_bits(I a, I b) { return _mm256_and_si256(a, b); }
  template <int n>
  static I shift_16(I a) {
    return _mm256_srai_epi16(a, n);
  }
  // sum + the products of both
  static I dot_16(I sum, I a, I b) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
  }

  // n bf16 values, each spread over L / n lanes.
  template <int n>
  static F spread_bf16(const uint8_t* p) {
    if constexpr (n == 1) {
      uint16_t value;
      std::memcpy(&value, p, 2);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(short(value)), 16));
    } else {
      static_assert(n == 2, "1 or 2");
      int32_t pair;
      std::memcpy(&pair, p, 4);
      const int first = 0x01008080, second = 0x03028080;
      const __m256i where = _mm256_set_epi32(second, second, second, second, first, first, first,
                                             first);
      return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(pair), where));
    }
  }
  // Of 2 bf16 values in each lane one.
  static F low_bf16(I pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)); }
  static F high_bf16(I pair) {
    return _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000))));
  }
  // L values that follow each other.
  static F load_bf16(const uint8_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load_int8(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static F load_fp16(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // out[i * L + r] = 4 bytes i of row r, for 16 bytes of L rows.
  static void transpose(const uint8_t* rows, int64_t stride, uint8_t* out) {
    const auto two = [&](int row) {  // rows row and row + 4
      const auto part = [&](int r) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (row + r) * stride));
      };
      return _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(4), 1);
    };
    const __m256i a = two(0), b = two(1), c = two(2), d = two(3);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), ab2 = _mm256_unpackhi_epi32(a, b);
    const __m256i cd = _mm256_unpacklo_epi32(c, d), cd2 = _mm256_unpackhi_epi32(c, d);
    __m256i* o = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(o, _mm256_unpacklo_epi64(ab, cd));
    _mm256_storeu_si256(o + 1, _mm256_unpackhi_epi64(ab, cd));
    _mm256_storeu_si256(o + 2, _mm256_unpacklo_epi64(ab2, cd2));
    _mm256_storeu_si256(o + 3, _mm256_unpackhi_epi64(ab2, cd2));
  }

#ifdef __AVXVNNI__
  template <int bits>
  struct Dot {
    static constexpr int kExcess = 1 << (bits - 1);
    using Acc = __m256i;
    using W = __m256i;
    static W codes(B b) { return b; }
    static Acc start(I offset) { return offset; }
    static Acc add(Acc acc, W w, B x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
    static I finish(Acc acc, I) { return acc; }
  };
#else
  // 4 bits: 8 additions of two products of 15 * 127 stay within 16 bits, and that is what the
  // kernels make of them: 32 elements of a lane, or fewer.
  template <int bits>
  struct Dot {
    static_assert(bits == 4, "8 bits are another matter");
    static constexpr int kExcess = 8;
    using Acc = __m256i;
    using W = __m256i;
    static W codes(B b) { return b; }
    static Acc start(I) { return _mm256_setzero_si256(); }
    static Acc add(Acc acc, W w, B x) {
      return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
    }
    static I finish(Acc acc, I offset) {
      return _mm256_add_epi32(offset, _mm256_madd_epi16(acc, _mm256_set1_epi16(1)));
    }
  };
#endif
};

#ifndef __AVXVNNI__
// 8 bits: codes up to 255 would overflow 16 bits, magnitudes up to 128 do not. The sign goes to
// the activation, which is never -128, so nothing is in excess.
template <>
struct Vec::Dot<8> {
  static constexpr int kExcess = 0;
  using Acc = __m256i;
  struct W {
    __m256i magnitude, value;
  };
  static W codes(B b) {
    const __m256i value = _mm256_xor_si256(b, _mm256_set1_epi8(-128));
    return {_mm256_abs_epi8(value), value};
  }
  static Acc start(I) { return _mm256_setzero_si256(); }
  static Acc add(Acc acc, W w, B x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I finish(Acc acc, I) { return acc; }
};
#endif

}  // namespace
