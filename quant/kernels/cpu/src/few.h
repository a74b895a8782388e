// Knows which number of tokens is few: then rows are read as they lie, else they are turned.
#pragma once

#include "types.h"

namespace moecli {

constexpr int kFew = 5;

inline bool is_few(int64_t tokens) { return tokens <= kFew; }

inline int64_t blocks_nbytes(const Kernels& kernels, int64_t in, int n) {
  const Blocks blocks(n, kernels.block);
  int64_t nbytes = 0;
  for (int b = 0; b < blocks.count; ++b) nbytes += kernels.block_nbytes(in, blocks.size(b));
  return nbytes;
}

}  // namespace moecli
