// Knows how few elements become 8-bit integers with a scale, with AVX2. Included by files that
// compile for one instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

inline float largest(__m256 x) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(magnitude),
                           _mm256_extractf128_ps(magnitude, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
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

// 32 elements by one scale: of a few that are near each other the one that fits best.
inline float quantize_group(const float* p, int8_t* codes) {
  __m256 x[4];
  __m256 magnitude = _mm256_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_loadu_ps(p + 8 * i);
    magnitude = _mm256_max_ps(magnitude, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x[i]));
  }
  const float most = largest(magnitude);
  if (!(most > 1e-30f)) {
    for (int i = 0; i < 32; ++i) codes[i] = 0;
    return most != most ? most : 0.0f;
  }
  float best_error = 3e38f, best_scale = most, best_steps = 127.0f;
  for (const float steps : kSteps) {
    const __m256 inverse = _mm256_set1_ps(steps / most);
    __m256 along = _mm256_setzero_ps(), length = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      const __m256 code = _mm256_round_ps(_mm256_mul_ps(x[i], inverse),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      along = _mm256_fmadd_ps(x[i], code, along);
      length = _mm256_fmadd_ps(code, code, length);
    }
    // With the scale that fits these codes best the squared error is |x|^2 - along^2 / length.
    const float a = total(along), l = total(length);
    const float error = -a * (a / l);
    if (error < best_error) best_error = error, best_scale = a / l, best_steps = steps;
  }
  const __m256 inverse = _mm256_set1_ps(best_steps / most);
  for (int i = 0; i < 4; ++i) {
    const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + 8 * i), to_bytes(code));
  }
  return best_scale;
}

}  // namespace
