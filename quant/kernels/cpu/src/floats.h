// Knows what is computed in floats: activations, sums of contributions, weights that are floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

using moecli::Activation;
using moecli::FloatType;

constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

// Relative error below 2e-7 (Cody and Waite's reduction, Taylor's series to the 7th power).
inline Vec::F exp(Vec::F x) {
  x = Vec::max(Vec::min(x, Vec::repeat(88.0f)), Vec::repeat(-87.0f));
  const Vec::I n = Vec::round(Vec::mul(x, Vec::repeat(1.44269504f)));
  const Vec::F whole = Vec::to_float(n);
  Vec::F r = Vec::fma(whole, Vec::repeat(-0.693359375f), x);
  r = Vec::fma(whole, Vec::repeat(2.12194440e-4f), r);
  Vec::F y = Vec::repeat(1.0f / 5040);
  for (const float c : kTaylor) y = Vec::fma(y, r, Vec::repeat(c));
  return Vec::mul(y, Vec::power_of_2(n));
}

inline Vec::F silu(Vec::F x) {
  const Vec::F one = Vec::repeat(1.0f);
  return Vec::div(x, Vec::add(one, exp(Vec::sub(Vec::zero(), x))));
}

// gpt-oss: (up + 1) * gate * sigmoid(1.702 * gate), both cut off at 7.
inline Vec::F clamped_swiglu(Vec::F gate, Vec::F up) {
  const Vec::F one = Vec::repeat(1.0f), limit = Vec::repeat(7.0f);
  gate = Vec::min(gate, limit);
  up = Vec::add(Vec::max(Vec::min(up, limit), Vec::repeat(-7.0f)), one);
  const Vec::F turned = exp(Vec::mul(gate, Vec::repeat(-1.702f)));
  return Vec::mul(up, Vec::div(gate, Vec::add(one, turned)));
}

inline Vec::F activated(Activation kind, Vec::F gate, Vec::F up) {
  switch (kind) {
    case moecli::kSilu: return Vec::mul(silu(gate), up);
    case moecli::kClampedSwiglu: return clamped_swiglu(gate, up);
  }
  return gate;
}

inline void activate(Activation kind, const float* gate, const float* up, float* out,
                     int64_t count) {
  int64_t i = 0;
  for (; i + Vec::L <= count; i += Vec::L) {
    Vec::store(out + i, activated(kind, Vec::load(gate + i), Vec::load(up + i)));
  }
  if (i < count) {
    float g[Vec::L] = {}, u[Vec::L] = {}, y[Vec::L];
    const size_t nbytes = static_cast<size_t>(count - i) * 4;
    std::memcpy(g, gate + i, nbytes);
    std::memcpy(u, up + i, nbytes);
    Vec::store(y, activated(kind, Vec::load(g), Vec::load(u)));
    std::memcpy(out + i, y, nbytes);
  }
}

inline void add_scaled(const float* y, float factor, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::L <= count; i += Vec::L) {
    Vec::store(out + i,
               Vec::add(Vec::load(out + i), Vec::mul(Vec::load(y + i), Vec::repeat(factor))));
  }
  for (; i < count; ++i) {
    const float product = y[i] * factor;
    out[i] += product;
  }
}

inline void store_scaled(const float* y, float factor, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = y[i] * factor;
}

template <int type>
struct Floats;
template <>
struct Floats<moecli::kFloat32> {
  static constexpr int kBytes = 4;
  static Vec::F load(const uint8_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};
template <>
struct Floats<moecli::kBfloat16> {
  static constexpr int kBytes = 2;
  static Vec::F load(const uint8_t* p) { return Vec::load_bf16(p); }
};
template <>
struct Floats<moecli::kFloat16> {
  static constexpr int kBytes = 2;
  static Vec::F load(const uint8_t* p) { return Vec::load_fp16(p); }
};

template <int type, int R, int N>
void float_micro(const uint8_t* weight, int64_t in, const float* x, int64_t x_stride, float* out,
                 int64_t ld) {
  using W = Floats<type>;
  Vec::F acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < N; ++t) acc[r][t] = Vec::zero();
  }
  int64_t i = 0;
  for (; i + Vec::L <= in; i += Vec::L) {
    Vec::F w[R];
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = weight + (r * in + i) * W::kBytes;
      moecli::fetch(at + R * in * W::kBytes);
      w[r] = W::load(at);
    }
    for (int t = 0; t < N; ++t) {
      const Vec::F value = Vec::load(x + t * x_stride + i);
      for (int r = 0; r < R; ++r) acc[r][t] = Vec::fma(w[r], value, acc[r][t]);
    }
  }
  if (i < in) {
    for (int r = 0; r < R; ++r) {
      uint8_t some[4 * Vec::L] = {};
      std::memcpy(some, weight + (r * in + i) * W::kBytes, static_cast<size_t>((in - i) * W::kBytes));
      const Vec::F w = W::load(some);
      for (int t = 0; t < N; ++t) {
        float last[Vec::L] = {};
        std::memcpy(last, x + t * x_stride + i, static_cast<size_t>((in - i) * 4));
        acc[r][t] = Vec::fma(w, Vec::load(last), acc[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < N; ++t) out[t * ld + r] = Vec::sum(acc[r][t]);
  }
}

template <int type, int R>
void float_rows(const uint8_t* weight, int64_t in, const float* x, int64_t x_stride, int n,
                float* out, int64_t ld) {
  for (; n >= 4; n -= 4, x += 4 * x_stride, out += 4 * ld) {
    float_micro<type, R, 4>(weight, in, x, x_stride, out, ld);
  }
  if (n >= 2) {
    float_micro<type, R, 2>(weight, in, x, x_stride, out, ld);
    n -= 2, x += 2 * x_stride, out += 2 * ld;
  }
  if (n) float_micro<type, R, 1>(weight, in, x, x_stride, out, ld);
}

template <int type>
void float_of(const uint8_t* weight, int64_t in, int64_t row0, int64_t rows, const float* x,
              int64_t x_stride, int n, float* out, int64_t ld) {
  constexpr int R = Vec::L == 16 ? 4 : 2;
  const int64_t stride = in * Floats<type>::kBytes;
  const uint8_t* w = weight + row0 * stride;
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    float_rows<type, R>(w + r * stride, in, x, x_stride, n, out + r, ld);
  }
  for (; r < rows; ++r) float_rows<type, 1>(w + r * stride, in, x, x_stride, n, out + r, ld);
}

inline void float_matmul(const uint8_t* weight, FloatType type, int64_t in, int64_t row0,
                         int64_t rows, const float* x, int64_t x_stride, int n, float* out,
                         int64_t ld) {
  switch (type) {
    case moecli::kFloat32:
      return float_of<moecli::kFloat32>(weight, in, row0, rows, x, x_stride, n, out, ld);
    case moecli::kBfloat16:
      return float_of<moecli::kBfloat16>(weight, in, row0, rows, x, x_stride, n, out, ld);
    case moecli::kFloat16:
      return float_of<moecli::kFloat16>(weight, in, row0, rows, x, x_stride, n, out, ld);
  }
}

}  // namespace
