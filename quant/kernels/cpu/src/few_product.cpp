// Knows products of few tokens with weights of either kind; see few_product.h.
#include "few_product.h"

#include <algorithm>

#include "pool.h"

namespace moecli {
namespace {

constexpr int64_t kWidth = 1024;  // elements of an item, a multiple of 32

int64_t parts(int64_t all, int64_t part) { return (all + part - 1) / part; }

}  // namespace

int64_t FewProduct::codes_nbytes() const {
  if (!count || !weights[0].quantized()) return 0;
  return turned() ? blocks_nbytes(k, in(), static_cast<int>(tokens)) : tokens * stride();
}

int64_t FewProduct::stride() const {
  return parts(k.rows_nbytes(in(), weights[0].matrix.bits), 64) * 64;
}

int64_t FewProduct::quantize_items() const {
  return count && weights[0].quantized() ? tokens * parts(in(), kWidth) : 0;
}

void FewProduct::quantize(int64_t item) const {
  const int64_t each = parts(in(), kWidth), t = item / each, begin = item % each * kWidth;
  const int64_t some = std::min(kWidth, in() - begin);
  const int bits = weights[0].matrix.bits;
  if (turned()) {
    const Blocks blocks(static_cast<int>(tokens), k.block);
    int b = 0;
    uint8_t* block = codes;
    for (; t >= blocks.first(b) + blocks.size(b); ++b) block += k.block_nbytes(in(), blocks.size(b));
    uint8_t* plain = thread_scratch(k.plain_nbytes(in()));
    k.plain_quantize(x + t * in() + begin, begin, some, bits, plain, in());
    k.block_insert(plain, in(), begin / 32, some / 32, 1.0f, static_cast<int>(t) - blocks.first(b),
                   blocks.size(b), block);
    return;
  }
  uint8_t* out = codes + t * stride();
  k.rows_quantize(x + t * in() + begin, 1.0f, begin, some, bits, out);
  if (begin + some == in()) k.rows_pad(in(), bits, out);
}

int64_t FewProduct::multiply_items() const {
  int64_t items = 0;
  for (int i = 0; i < count; ++i) items += parts(weights[i].rows, item_rows());
  return items;
}

void FewProduct::multiply(int64_t item) const {
  const int64_t whole = item;
  int i = 0;
  for (; item >= parts(weights[i].rows, item_rows()); ++i) item -= parts(weights[i].rows, item_rows());
  const int64_t row = item * item_rows(), all = weights[i].rows;
  rows(weights[i], row, std::min(item_rows(), all - row), outs[i] + row, all, read_by(whole + threads));
}

Next FewProduct::read_by(int64_t item) const {
  for (int i = 0; i < count; ++i) {
    const Matrix& m = weights[i].matrix;
    const int64_t items = parts(weights[i].rows, item_rows());
    if (item < items) return Next::of(m, item * item_rows());
    item -= items;
  }
  return then ? then->read_by(item) : Next();
}

void FewProduct::rows(const Weight& weight, int64_t row, int64_t some, float* out, int64_t ld,
                      const Next& next) const {
  const int n = static_cast<int>(tokens);
  if (turned()) {
    uint8_t* scratch = thread_scratch(k.tiles_scratch(in(), weight.matrix.bits));
    k.tiles_matmul(weight.matrix, row, some, codes, n, out, ld, scratch, next);
  } else if (weight.quantized()) {
    const uint8_t* tokens_at[kFew];
    for (int t = 0; t < n; ++t) tokens_at[t] = codes + t * stride();
    k.rows_matmul(weight.matrix, row, some, tokens_at, n, out, ld, next);
  } else {
    k.float_matmul(weight.matrix.packed, static_cast<FloatType>(weight.type), in(), row, some, x,
                   in(), n, out, ld);
  }
  if (!weight.bias) return;
  for (int t = 0; t < n; ++t) {
    for (int64_t r = 0; r < some; ++r) out[t * ld + r] += weight.bias[row + r];
  }
}

}  // namespace moecli
