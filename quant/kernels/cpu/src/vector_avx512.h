// Knows vectors of 512 bits with AVX512 (F, BW, DQ, VL) and VNNI. Included by one file only.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Vec {
  static constexpr int L = 16;  // 32-bit lanes
  static constexpr int kWide = 2;   // tiles at once, which share the codes of tokens
  static constexpr int kBlock = 4;  // tokens of a block that then fit the registers
  using F = __m512;
  using I = __m512i;
  using B = __m512i;  // 4 bytes a lane

  static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static B load_bytes(const uint8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);  // n < 64
  }
  static B repeat_4_bytes(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
  }
  static B low_nibbles(B b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
  static B high_nibbles(B b) {
    return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15));
  }

  // Loads are what these kernels run out of: what is used twice stays in a register.
  template <class V>
  static V keep(V value) {
    asm("" : "+v"(value));
    return value;
  }

  static F zero() { return _mm512_setzero_ps(); }
  static F repeat(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F where_less(F a, F b, F less, F other) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), other, less);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  // Lane i: the sum of vector i. Halves of two vectors share one, then quarters of four.
  static F sums(const F (&a)[L]) {
    F b[8], c[4];
    for (int i = 0; i < 8; ++i) {
      b[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44),
                 _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
    }
    for (int i = 0; i < 4; ++i) {  // quarters: of vectors i, i + 8, i + 4, i + 12
      c[i] = add(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                 _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
    }
    const auto pair = [](F x, F y) {
      return _mm512_castps_pd(add(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
    };
    const __m512d d = pair(c[0], c[1]), e = pair(c[2], c[3]);
    const F all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(d, e)),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(d, e)));
    return _mm512_shuffle_f32x4(all, all, 0xd8);
  }

  static I load_ints(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static I repeat_int(const uint8_t* p) { return repeat_4_bytes(p); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I round(F a) { return _mm512_cvtps_epi32(a); }
  static F power_of_2(I a) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23));
  }

  // 16-bit integers, two a lane. A product is divided by 2^15, and rounded; an addition ends where
  // 16 bits end.
  static I pair(I low, I high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
  }
  static I repeat_16(int value) { return _mm512_set1_epi16(short(value)); }
  static I mul_16(I a, I b) { return _mm512_mulhrs_epi16(a, b); }
  static I add_16(I a, I b) { return _mm512_adds_epi16(a, b); }
  static I sub_16(I a, I b) { return _mm512_sub_epi16(a, b); }
  static I min_16(I a, I b) { return _mm512_min_epi16(a, b); }
  static I max_16(I a, I b) { return _mm512_max_epi16(a, b); }
  static I and_bits(I a, I b) { return _mm512_and_si512(a, b); }
  template <int n>
  static I shift_16(I a) {
    return _mm512_srai_epi16(a, n);
  }
  // sum + the products of both
  static I dot_16(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }

  // n bf16 values, each spread over L / n lanes.
  template <int n>
  static F spread_bf16(const uint8_t* p) {
    if constexpr (n == 1) {
      uint16_t value;
      std::memcpy(&value, p, 2);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(short(value)), 16));
    } else {
      __m512i all;
      if constexpr (n == 2) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        all = _mm512_set1_epi32(pair);
      } else {
        static_assert(n == 4, "1, 2 or 4");
        int64_t four;
        std::memcpy(&four, p, 8);
        all = _mm512_set1_epi64(four);
      }
      const auto at = [](int lane) { return int(0x01008080 + 0x02020000 * (lane * n / 16)); };
      const __m512i where =
          _mm512_set_epi32(at(15), at(14), at(13), at(12), at(11), at(10), at(9), at(8), at(7),
                           at(6), at(5), at(4), at(3), at(2), at(1), at(0));
      return _mm512_castsi512_ps(_mm512_shuffle_epi8(all, where));
    }
  }
  // Of 2 bf16 values in each lane one.
  static F low_bf16(I pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
  static F high_bf16(I pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000))));
  }
  // L values that follow each other.
  static F load_bf16(const uint8_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load_int8(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static F load_fp16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // out[i * L + r] = 4 bytes i of row r, for 16 bytes of L rows.
  static void transpose(const uint8_t* rows, int64_t stride, uint8_t* out) {
    const auto four = [&](int row) {  // rows row, row + 4, + 8, + 12
      const auto part = [&](int r) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (row + 4 * r) * stride));
      };
      __m512i all = _mm512_castsi128_si512(part(0));
      all = _mm512_inserti32x4(all, part(1), 1);
      all = _mm512_inserti32x4(all, part(2), 2);
      return _mm512_inserti32x4(all, part(3), 3);
    };
    const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), ab2 = _mm512_unpackhi_epi32(a, b);
    const __m512i cd = _mm512_unpacklo_epi32(c, d), cd2 = _mm512_unpackhi_epi32(c, d);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
    _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi64(ab, cd));
    _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi64(ab2, cd2));
    _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi64(ab2, cd2));
  }

  // Sums of products of codes and activations. `offset` takes off what codes have too much:
  // 2^(bits-1) times the sum of the activations, of each lane.
  template <int bits>
  struct Dot {
    static constexpr int kExcess = 1 << (bits - 1);
    using Acc = __m512i;
    using W = __m512i;
    static W codes(B b) { return b; }
    static Acc start(I offset) { return offset; }
    static Acc add(Acc acc, W w, B x) { return _mm512_dpbusd_epi32(acc, w, x); }
    static I finish(Acc acc, I) { return acc; }
  };
};

}  // namespace
