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

}  // namespace
