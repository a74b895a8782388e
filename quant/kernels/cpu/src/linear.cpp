// Knows products of one input with weights, as phases of items; see linear.h.
#include "linear.h"

#include <algorithm>

#include "few.h"
#include "pool.h"

namespace moecli {
namespace {

constexpr int64_t kRows = 64;  // of an item
constexpr int kTokens = 4;     // of a float product at once

struct Product {
  const Kernels& k;
  const float* x;
  int64_t tokens;
  const Linear* all;
  int count, threads;
  int64_t stride;  // few: of a token
  uint8_t* memory;

  int64_t in() const { return all[0].weight.in; }
  int bits() const { return all[0].weight.bits; }

  void quantize_token(int64_t t) const {
    uint8_t* out = memory + t * stride;
    k.rows_quantize(x + t * in(), 1.0f, 0, in(), bits(), out);
    k.rows_pad(in(), bits(), out);
  }

  void quantize_block(int64_t item) const {
    const Blocks blocks(static_cast<int>(tokens), k.block);
    const int b = static_cast<int>(item), size = blocks.size(b);
    uint8_t* plain = thread_scratch(k.plain_nbytes(in()));
    for (int slot = 0; slot < size; ++slot) {
      const int64_t t = blocks.first(b) + slot;
      k.plain_quantize(x + t * in(), 0, in(), bits(), plain, in());
      k.block_insert(plain, in(), 0, in() / 32, 1.0f, slot, size,
                     memory + k.block_nbytes(in(), blocks.first(b)));
    }
  }

  static int64_t parts(const Linear& one) { return (one.rows + kRows - 1) / kRows; }

  // Item -> which product, and which of its rows.
  const Linear& find(int64_t item, int64_t* row) const {
    const Linear* one = all;
    for (; item >= parts(*one); ++one) item -= parts(*one);
    *row = item * kRows;
    return *one;
  }

  // What this thread will probably take next.
  Next after(int64_t item) const {
    if (item + threads >= items()) return {};
    int64_t row;
    const Matrix& m = find(item + threads, &row).weight;
    return Next::of(m, row);
  }

  int64_t items() const {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += parts(all[i]);
    return total;
  }

  void multiply_few(int64_t item) const {
    int64_t row;
    const Linear& one = find(item, &row);
    const uint8_t* tokens_at[kFew];
    for (int64_t t = 0; t < tokens; ++t) tokens_at[t] = memory + t * stride;
    k.rows_matmul(one.weight, row, std::min(kRows, one.rows - row), tokens_at,
                  static_cast<int>(tokens), one.out + row, one.rows, after(item));
  }

  void multiply_many(int64_t item) const {
    int64_t row;
    const Linear& one = find(item, &row);
    uint8_t* scratch = thread_scratch(k.tiles_scratch(in(), bits()));
    k.tiles_matmul(one.weight, row, std::min(kRows, one.rows - row), memory,
                   static_cast<int>(tokens), one.out + row, one.rows, scratch,
                   after(item));
  }
};

}  // namespace

void linears(const Kernels& kernels, const float* x, int64_t tokens, const Linear* all, int count,
             int threads) {
  Pool& pool = Pool::instance();
  const auto lock = pool.acquire();
  Product product = {kernels, x, tokens, all, count, threads, 0, nullptr};
  if (is_few(tokens)) {
    product.stride = (kernels.rows_nbytes(product.in(), product.bits()) + 63) / 64 * 64;
    product.memory = pool.workspace(tokens * product.stride);
    auto quantize = [&](int64_t item) { product.quantize_token(item); };
    auto multiply = [&](int64_t item) { product.multiply_few(item); };
    const Phase phases[] = {Phase::of(tokens, quantize),
                            Phase::of(product.items(), multiply)};
    pool.run(threads, phases, 2);
  } else {
    const int n = static_cast<int>(tokens);
    product.memory = pool.workspace(blocks_nbytes(kernels, product.in(), n));
    auto quantize = [&](int64_t item) { product.quantize_block(item); };
    auto multiply = [&](int64_t item) { product.multiply_many(item); };
    const Phase phases[] = {Phase::of(Blocks(n, kernels.block).count, quantize),
                            Phase::of(product.items(), multiply)};
    pool.run(threads, phases, 2);
  }
}

void linear_float(const Kernels& kernels, const float* x, int64_t tokens, const uint8_t* weight,
                  FloatType type, int64_t rows, int64_t in, float* out, int threads) {
  Pool& pool = Pool::instance();
  const auto lock = pool.acquire();
  auto multiply = [&](int64_t item) {
    const int64_t row = item * kRows, some = std::min(kRows, rows - row);
    for (int64_t t = 0; t < tokens; t += kTokens) {
      kernels.float_matmul(weight, type, in, row, some, x + t * in, in,
                           static_cast<int>(std::min<int64_t>(kTokens, tokens - t)),
                           out + t * rows + row, rows);
    }
  };
  const Phase phase = Phase::of((rows + kRows - 1) / kRows, multiply);
  pool.run(threads, &phase, 1);
}

}  // namespace moecli
