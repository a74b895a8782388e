// Knows which number of tokens is few: then rows are read as they lie, else they are turned.
#pragma once

#include "types.h"

namespace moecli {

// From three on turned rows are faster, from memory as in cache, with every instruction set of x86.
constexpr int kFew = 2;

inline bool is_few(int64_t tokens) { return tokens <= kFew; }

inline int64_t blocks_nbytes(const Kernels& kernels, int64_t in, int n) {
  const Blocks blocks(n, kernels.block);
  int64_t nbytes = 0;
  for (int b = 0; b < blocks.count; ++b) nbytes += kernels.block_nbytes(in, blocks.size(b));
  return nbytes;
}

}  // namespace moecli
