// Knows how few elements become 8-bit integers with a scale, on any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline float largest(const float* x, int count) {
  float most = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    most = magnitude > most || magnitude != magnitude ? magnitude : most;
  }
  return most;
}

// 8 codes in the order that 4-bit weights have: even elements, then odd ones.
inline uint64_t evens_first(uint64_t codes) {
  uint8_t in[8], out[8];
  std::memcpy(in, &codes, 8);
  for (int i = 0; i < 4; ++i) out[i] = in[2 * i], out[i + 4] = in[2 * i + 1];
  std::memcpy(&codes, out, 8);
  return codes;
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
inline float quantize_group(const float* x, int8_t* codes) {
  const float most = largest(x, 32);
  if (!(most > kLeast && most < kMost)) {
    std::memset(codes, 0, 32);
    return most < kMost ? 0.0f : not_a_number();
  }
  float best = 0.0f, best_scale = 0.0f, best_steps = 0.0f;
  for (const float steps : kSteps) {
    const float inverse = steps / most;
    float along = 0.0f, length = 0.0f;
    for (int i = 0; i < 32; ++i) {
      const float scaled = x[i] * inverse, code = std::rint(scaled);
      along += scaled * code;
      length += code * code;
    }
    // With the scale that fits these codes best, |x|^2 less this is the squared error.
    const float fit = along / length, gain = along * fit / (steps * steps);
    if (gain > best) best = gain, best_scale = fit * (most / steps), best_steps = steps;
  }
  for (int i = 0; i < 32; ++i) {
    codes[i] = static_cast<int8_t>(std::lrintf(x[i] * (best_steps / most)));
  }
  return best_scale;
}

constexpr int kTogether = 1;  // groups that `quantize_groups` takes

inline void quantize_groups(const float* x, int8_t* codes, float* scale) {
  *scale = quantize_group(x, codes);
}

}  // namespace
