// Knows the table of kernels for the vectors of the file that includes it, and no vectors itself.
// All is local to that file: what is compiled for AVX512 must not be taken for another's.
#pragma once

#include "floats.h"
#include "heads.h"
#include "rows.h"
#include "scales.h"
#include "tiles.h"

namespace {

constexpr moecli::Kernels kernels_called(const char* name) {
  return {name,         rows_nbytes,    rows_pad,     rows_quantize, rows_matmul,
          Vec::kBlock,  plain_nbytes,   plain_quantize, block_nbytes, block_insert,
          tiles_scratch, tiles_matmul,  activate,     add_scaled,    store_scaled,
          float_matmul, rms_norm,       rotate,       store_head,    attend,
          search_scales};
}

}  // namespace
