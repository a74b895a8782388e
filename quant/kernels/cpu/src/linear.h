// Knows products of one input with weights, as phases of items.
#pragma once

#include "types.h"

namespace moecli {

struct Linear {
  Matrix weight;
  int64_t rows;
  float* out;  // [T, rows]
};

// Weights of equal `in` and `bits`: their input x [T, in] is quantized once.
void linears(const Kernels& kernels, const float* x, int64_t tokens, const Linear* all, int count,
             int threads);

// out [T, rows] of x [T, in] and a float weight [rows, in].
void linear_float(const Kernels& kernels, const float* x, int64_t tokens, const uint8_t* weight,
                  FloatType type, int64_t rows, int64_t in, float* out, int threads);

}  // namespace moecli
