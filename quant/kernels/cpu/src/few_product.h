// Knows products of few tokens with weights of either kind, as items of two phases: the input is
// quantized, where a weight is, then rows are multiplied.
#pragma once

#include "few.h"

namespace moecli {

constexpr int kQuantized = -1;
constexpr int kMostTokens = 8;

struct Weight {
  Matrix matrix;      // of floats: `packed` is [rows, in], and `in` counts
  int64_t rows;       // 0: there is no such weight
  int type;           // kQuantized or a FloatType
  const float* bias;  // [rows], or null

  bool quantized() const { return type == kQuantized; }
};

// Weights of one input x [T, in]: all quantized with equal bits, or all of floats. Of some tokens
// more than `kFew` rows of codes are turned, as in tiles.h, which is faster then.
struct FewProduct {
  static constexpr int kMost = 3;
  static constexpr int64_t kGroup = 32;      // activations that have a scale of their own
  static constexpr int64_t kMostRows = 128;  // of an item

  const Kernels& k;
  int64_t tokens;
  const float* x;
  Weight weights[kMost];
  float* outs[kMost];  // [T, rows] each
  int count = 0;
  int64_t all_rows = 0;  // of all weights
  uint8_t* codes = nullptr;          // codes_nbytes(); of tokens one by one, or of blocks
  int threads;                       // that take the items
  const FewProduct* then = nullptr;  // whose weights are read after these

  FewProduct(const Kernels& kernels, int64_t num_tokens, const float* input, int num_threads)
      : k(kernels), tokens(num_tokens), x(input), threads(num_threads) {}
  void add(const Weight& weight, float* out) {
    weights[count] = weight;
    outs[count++] = out;
    all_rows += weight.rows;
  }
  // Of an item: a long run of memory, but items enough for all threads; whole groups of activations.
  static int64_t item_rows(int64_t all_rows, int threads) {
    const int64_t rows = all_rows / (8 * threads) / kGroup * kGroup;
    return rows < kGroup ? kGroup : rows > kMostRows ? kMostRows : rows;
  }

  int64_t in() const { return weights[0].matrix.in; }
  int64_t codes_nbytes() const;
  int64_t quantize_items() const;
  void quantize(int64_t item) const;
  int64_t multiply_items() const;
  void multiply(int64_t item) const;
  // Some rows of one weight, biases included: out[t * ld + r]. next: as `rows_matmul` has it.
  void rows(const Weight& weight, int64_t row, int64_t some, float* out, int64_t ld,
            const Next& next) const;
  // What an item reads; beyond the last one, what `then` reads.
  Next read_by(int64_t item) const;

 private:
  int64_t item_rows() const { return item_rows(all_rows, threads); }
  bool turned() const { return weights[0].quantized() && !is_few(tokens); }
  int64_t stride() const;
};

}  // namespace moecli
