// Knows the values that all files share: a weight as it lies in memory, and who computes.
//
// Legend: T tokens, O out, I in features, L lanes: 32-bit values of one vector register.
#pragma once

#include <cstdint>
#include <cstring>

namespace moecli {

// A quantized weight [O, I], or a part of one: rows of packed codes, and of bf16 scales. Neither
// has an alignment. A row's codes are those of the file format: at 4 bits byte b holds elements 2b
// (low) and 2b+1 (high), at 8 bits byte b is element b; what is stored is q + 2^(bits-1).
struct Matrix {
  const uint8_t* packed;
  const uint8_t* scale;
  int64_t packed_stride;  // bytes from row to row
  int64_t scale_stride;   // bytes from row to row
  int64_t in;             // a multiple of `group`
  int bits;               // 4 or 8
  int group;              // 32, 64 or 128
};

// What a thread will probably read after some rows of a matrix: rows of the same size, whose codes and
// scales begin there. Null where that is not known.
struct Next {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;

  __attribute__((always_inline)) static Next of(const Matrix& m, int64_t row) {
    return {m.packed + row * m.packed_stride, m.scale + row * m.scale_stride};
  }
};

enum FloatType { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Activation { kSilu = 0, kClampedSwiglu = 1 };
enum Rope { kNoRope = 0, kInterleaved = 1, kHalf = 2 };

// How a cache keeps a head's key, or value: floats, or integers up to 127 times a scale in bf16.
enum KeptType { kKeptFloat32 = 0, kKeptBfloat16 = 1, kKeptInt8 = 2 };

// A part of what one key head has in a cache: rows of D keys, and of D values.
struct Slots {
  const uint8_t* keys;
  const uint8_t* values;
  const uint8_t* key_scales;  // of integers, one a row; else null
  const uint8_t* value_scales;
  KeptType type;
  int64_t size;   // D
  int64_t count;  // 1 to kSplit
};

constexpr int64_t kSplit = 512;  // slots that are looked at as one; never depends on threads

// Elements of a head in memory of our own: whole vectors of every instruction set.
constexpr int64_t padded_size(int64_t head_size) { return (head_size + 15) / 16 * 16; }

// The search for the scales of a weight, whose groups lie one after the other; see scales.h.
struct ScaleSearch {
  const uint8_t* weight;
  FloatType type;
  int64_t rows, row_groups;
  int bits;                  // 4 or 8
  int group;                 // 32, 64 or 128
  const int32_t* factors;    // at 4 bits: -extreme / scale of those to try, in parts of 2048
  int count;
  int first_step, end_step;  // at 8 bits: neighbours in bf16 of extreme / -128 to try
  uint8_t* packed;
  uint16_t* scale;
  double* row_errors;   // of each row: squared error
  double* row_squares;  // and sum of squares
};

// What one instruction set offers. Activations are quantized to 8 bits in two forms, each made for
// the kernel that reads it: "rows" for few tokens, "tiles" for
// many; the integers are the same in both, 32 elements a scale.
struct Kernels {
  const char* name;

  // Rows: the activations of one token, as `rows_nbytes` bytes.
  int64_t (*rows_nbytes)(int64_t in, int bits);
  // Zeroes what lies behind the last element.
  void (*rows_pad)(int64_t in, int bits, uint8_t* out);
  // Elements begin..begin+count-1, both multiples of 32, of factor * x.
  void (*rows_quantize)(const float* x, float factor, int64_t begin, int64_t count, int bits,
                        uint8_t* out);
  // out[t * ld + r] = row (row0 + r) of m times token t, for `rows` rows; n is 1 or 2. What is
  // next is fetched towards the end.
  void (*rows_matmul)(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* const* x, int n,
                      float* out, int64_t ld, const Next& next);

  // Tiles: a token is quantized by itself; blocks of up to `block` tokens are then interleaved.
  int block;
  int64_t (*plain_nbytes)(int64_t in);
  void (*plain_quantize)(const float* x, int64_t begin, int64_t count, int bits, uint8_t* out,
                         int64_t in);
  int64_t (*block_nbytes)(int64_t in, int n);
  // Groups begin..begin+count-1, of 32 elements, of token `slot` of n; its scales times factor.
  void (*block_insert)(const uint8_t* plain, int64_t in, int64_t begin, int64_t count, float factor,
                       int slot, int n, uint8_t* out);
  int64_t (*tiles_scratch)(int64_t in, int bits);
  // out[t * ld + r] for all tokens of all blocks. The more rows, the better what tokens have stays
  // in the second cache.
  void (*tiles_matmul)(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* x, int n,
                       float* out, int64_t ld, uint8_t* scratch, const Next& next);

  // out = activation(gate) * up
  void (*activate)(Activation kind, const float* gate, const float* up, float* out, int64_t count);
  // out += factor * y, rounded twice: as if factor * y had been stored
  void (*add_scaled)(const float* y, float factor, float* out, int64_t count);
  void (*store_scaled)(const float* y, float factor, float* out, int64_t count);
  // out[t * ld + r] = row (row0 + r) of a float weight times x[t * x_stride ...]
  void (*float_matmul)(const uint8_t* weight, FloatType type, int64_t in, int64_t row0,
                       int64_t rows, const float* x, int64_t x_stride, int n, float* out,
                       int64_t ld);

  // Heads. out = x / sqrt(mean of squares + eps) * weight; no weight: ones. out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, int64_t count);
  void (*rotate)(Rope rope, const float* turns, float* x, int64_t size);
  // x [count] as a cache keeps it; scale: of integers, where their scale goes.
  void (*store_head)(const float* x, KeptType type, uint8_t* out, uint8_t* scale, int64_t count);
  // Of `group` queries q [group, P] with zeros behind D: sums out [group, P] of exp(score - most)
  // times value, and of exp(score - most) alone. scores: scratch [group, kSplit].
  void (*attend)(const Slots& slots, const float* q, int64_t group, float* out, float* most,
                 float* total, float* scores);

  // Rows begin..end-1; false where a weight is not finite, or too large.
  bool (*search_scales)(const ScaleSearch& search, int64_t begin, int64_t end);
};

// Where a line goes that is fetched from main memory before it is read. Intel's cores wait for 16 at
// most on their way into the first cache, and for three times as many into the second: rows are
// read 2.5 times as fast so. AMD's were faster with the first.
extern const bool kFetchIntoSecond;

namespace {  // of each file its own: see kernels.h

inline void fetch(const void* at) {
  if (kFetchIntoSecond) {
    __builtin_prefetch(at, 0, 2);
  } else {
    __builtin_prefetch(at, 0, 0);
  }
}

inline int64_t kept_nbytes(KeptType type) {
  return type == kKeptFloat32 ? 4 : type == kKeptBfloat16 ? 2 : 1;
}

inline float from_bf16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// How n tokens are cut into blocks of at most `block`: as even as can be.
struct Blocks {
  int count, base, longer;  // the first `longer` blocks have base + 1 tokens, the others base

  Blocks(int n, int block)
      : count((n + block - 1) / block),
        base(count ? n / count : 0),
        longer(count ? n % count : 0) {}
  int size(int b) const { return base + (b < longer ? 1 : 0); }
  int first(int b) const { return b * base + (b < longer ? b : longer); }
};

}  // namespace
}  // namespace moecli
