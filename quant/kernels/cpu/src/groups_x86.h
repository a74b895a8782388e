// Knows how few elements become 8-bit integers with a scale, with AVX2. Included by files that
// compile for one instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

// The largest magnitude. Compared as integers, among which "not a number" is the largest of all.
inline float largest(__m256i magnitudes) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(magnitudes),
                               _mm256_extracti128_si256(magnitudes, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(most));
}

inline float total(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

inline __m128i to_bytes(__m256i codes) {  // 8 signed bytes in the low half
  const __m128i pairs =
      _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  return _mm_packs_epi16(pairs, pairs);
}

// 8 codes in the order that 4-bit weights have: even elements, then odd ones.
inline uint64_t evens_first(uint64_t codes) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7);
  return static_cast<uint64_t>(
      _mm_cvtsi128_si64(_mm_shuffle_epi8(_mm_cvtsi64_si128(int64_t(codes)), order)));
}

constexpr int kGroup = 32;  // elements of a scale

// Which code the largest of 32 elements may get.
constexpr float kSteps[] = {127.49f, 126.2f, 124.9f, 123.6f, 122.3f, 121.0f};

// Groups whose largest is less count as zeros, those whose largest is more as no numbers.
constexpr float kLeast = 1e-30f, kMost = 3e38f;

inline float not_a_number() {
  const uint32_t bits = 0x7fc00000;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// 32 elements by one scale: of a few that are near each other the one that fits best.
inline float quantize_group(const float* p, int8_t* codes) {
  __m256 x[4];
  __m256i magnitude = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_loadu_ps(p + 8 * i);
    magnitude = _mm256_max_epi32(
        magnitude, _mm256_and_si256(_mm256_castps_si256(x[i]), _mm256_set1_epi32(0x7fffffff)));
  }
  const float most = largest(magnitude);
  if (!(most > kLeast && most < kMost)) {
    for (int i = 0; i < 32; ++i) codes[i] = 0;
    return most < kMost ? 0.0f : not_a_number();
  }
  float best = 0.0f, best_scale = 0.0f, best_steps = 0.0f;
  for (const float steps : kSteps) {
    const __m256 inverse = _mm256_set1_ps(steps / most);
    __m256 along = _mm256_setzero_ps(), length = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const __m256 scaled = _mm256_mul_ps(x[i], inverse);
      const __m256 code =
          _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      along = _mm256_fmadd_ps(scaled, code, along);
      length = _mm256_fmadd_ps(code, code, length);
    }
    // With the scale that fits these codes best, |x|^2 less this is the squared error.
    const float a = total(along), fit = a / total(length), gain = a * fit / (steps * steps);
    if (gain > best) best = gain, best_scale = fit * (most / steps), best_steps = steps;
  }
  const __m256 inverse = _mm256_set1_ps(best_steps / most);
  for (int i = 0; i < 4; ++i) {
    const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + 8 * i), to_bytes(code));
  }
  return best_scale;
}

#ifdef __AVX512F__
constexpr int kTogether = 2;  // groups that `quantize_groups` takes

// Two groups at once, the first in lower halves: lane by lane what `quantize_group` computes.
inline void quantize_groups(const float* p, int8_t* codes, float* scale) {
  const auto both = [](const float* low, const float* high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
  };
  __m512 x[4];
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    x[i] = both(p + 8 * i, p + 32 + 8 * i);
    most = _mm512_max_epi32(
        most, _mm512_and_si512(_mm512_castps_si512(x[i]), _mm512_set1_epi32(0x7fffffff)));
  }
  most = _mm512_max_epi32(most, _mm512_shuffle_i32x4(most, most, 0xb1));
  most = _mm512_max_epi32(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
  most = _mm512_max_epi32(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
  // Quarters from here on: steps 0 to 3 of the first, of the second, then steps 4, 5, 4, 5.
  const __m512 top = _mm512_castsi512_ps(_mm512_shuffle_i32x4(most, most, 0x88));
  const __m512 steps = _mm512_setr_ps(
      kSteps[0], kSteps[1], kSteps[2], kSteps[3], kSteps[0], kSteps[1], kSteps[2], kSteps[3],
      kSteps[4], kSteps[5], kSteps[4], kSteps[5], kSteps[4], kSteps[5], kSteps[4], kSteps[5]);
  const __mmask16 fine = _mm512_cmp_ps_mask(top, _mm512_set1_ps(kLeast), _CMP_GT_OQ) &
                         _mm512_cmp_ps_mask(top, _mm512_set1_ps(kMost), _CMP_LT_OQ);
  if (fine != 0xffff) {
    for (int i = 0; i < 2; ++i) scale[i] = quantize_group(p + 32 * i, codes + 32 * i);
    return;
  }
  const __m512 inverses = _mm512_div_ps(steps, top);
  __m512 sums[6];  // quarters: along of the first and the second, length of both
  for (int k = 0; k < 6; ++k) {
    const int first = k < 4 ? k : k + 4;
    const __m512i where =
        _mm512_inserti64x4(_mm512_set1_epi32(first), _mm256_set1_epi32(first + 4), 1);
    const __m512 inverse = _mm512_permutexvar_ps(where, inverses);
    __m512 along = _mm512_setzero_ps(), length = _mm512_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const __m512 scaled = _mm512_mul_ps(x[i], inverse);
      const __m512 code =
          _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      along = _mm512_fmadd_ps(scaled, code, along);
      length = _mm512_fmadd_ps(code, code, length);
    }
    sums[k] = _mm512_add_ps(_mm512_shuffle_f32x4(along, length, 0x88),
                            _mm512_shuffle_f32x4(along, length, 0xdd));
  }
  const auto totals = [](__m512 a, __m512 b, __m512 c, __m512 d) {  // of each quarter
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  };
  const __m512 t = totals(sums[0], sums[1], sums[2], sums[3]);
  const __m512 u = totals(sums[4], sums[5], sums[4], sums[5]);
  const __m512 along = _mm512_shuffle_f32x4(t, u, 0x44);
  const __m512 fit = _mm512_div_ps(along, _mm512_shuffle_f32x4(t, u, 0xee));
  const __m512 gain = _mm512_div_ps(_mm512_mul_ps(along, fit), _mm512_mul_ps(steps, steps));
  __m512 best = _mm512_max_ps(gain, _mm512_shuffle_f32x4(gain, gain, 0x4e));
  best = _mm512_max_ps(best, _mm512_permute_ps(best, 0x4e));
  best = _mm512_max_ps(best, _mm512_permute_ps(best, 0xb1));
  const unsigned is_best = _mm512_cmp_ps_mask(gain, best, _CMP_EQ_OQ);
  alignas(64) float scales[16], chosen[16];
  _mm512_store_ps(scales, _mm512_mul_ps(fit, _mm512_div_ps(top, steps)));
  _mm512_store_ps(chosen, inverses);
  const int first = __builtin_ctz(is_best & 0x0f0f), second = __builtin_ctz(is_best & 0xf0f0);
  scale[0] = scales[first];
  scale[1] = scales[second];
  const __m512 inverse = _mm512_insertf32x8(_mm512_set1_ps(chosen[first]),
                                            _mm256_set1_ps(chosen[second]), 1);
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes =
        _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + 8 * i), bytes);
    _mm_storeh_pd(reinterpret_cast<double*>(codes + 32 + 8 * i), _mm_castsi128_pd(bytes));
  }
}
#else
constexpr int kTogether = 1;

inline void quantize_groups(const float* p, int8_t* codes, float* scale) {
  *scale = quantize_group(p, codes);
}
#endif

}  // namespace
