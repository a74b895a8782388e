// Knows products for few tokens: rows are read as they lie, and each is used for all tokens.
//
// The activations of a token are chunks, one for each vector of packed bytes:
//   4 bits: 4L codes of even elements, 4L codes of odd ones, L offsets, L scales; lane l: elements
//           8l..8l+7 of the chunk
//   8 bits: 4L codes, L offsets, L scales; lane l: elements 4l..4l+3
// so that one conversion to float serves all that a lane has of a chunk.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

using moecli::Matrix;
using moecli::Next;

template <int bits>
struct Chunk {
  static constexpr int kElements = bits == 4 ? 8 * Vec::L : 4 * Vec::L;
  static constexpr int kCodes = kElements;
  static constexpr int kOffsets = kCodes;
  static constexpr int kScales = kOffsets + 4 * Vec::L;
  static constexpr int kBytes = kScales + 4 * Vec::L;
};

inline int64_t rows_nbytes(int64_t in, int bits) {
  const int64_t elements = bits == 4 ? Chunk<4>::kElements : Chunk<8>::kElements;
  const int64_t nbytes = bits == 4 ? Chunk<4>::kBytes : Chunk<8>::kBytes;
  return (in + elements - 1) / elements * nbytes;
}

// 32 elements; group: which 32 of the row.
template <int bits>
void put_group(uint8_t* out, int64_t group, const int8_t (&codes)[kGroup], float scale) {
  using C = Chunk<bits>;
  constexpr int kWidth = bits == 4 ? 8 : 4;  // elements of a lane
  const auto put = [](uint8_t* at, auto value) { std::memcpy(at, &value, sizeof value); };
  uint8_t* chunk = out + group / (C::kElements / kGroup) * C::kBytes;
  int64_t lane = group % (C::kElements / kGroup) * (kGroup / kWidth);
  for (int i = 0; i < kGroup; i += kWidth, ++lane) {
    int32_t sum = 0;
    for (int j = i; j < i + kWidth; ++j) sum += codes[j];
    put(chunk + C::kOffsets + 4 * lane, -Vec::Dot<bits>::kExcess * sum);
    put(chunk + C::kScales + 4 * lane, scale);
    if constexpr (bits == 4) {
      uint64_t eight;
      std::memcpy(&eight, codes + i, 8);
      eight = evens_first(eight);
      put(chunk + 4 * lane, static_cast<uint32_t>(eight));
      put(chunk + 4 * Vec::L + 4 * lane, static_cast<uint32_t>(eight >> 32));
    } else {
      std::memcpy(chunk + 4 * lane, codes + i, 4);
    }
  }
}

inline void put_group(uint8_t* out, int64_t group, const int8_t (&codes)[kGroup], float scale,
                      int bits) {
  if (bits == 4) {
    put_group<4>(out, group, codes, scale);
  } else {
    put_group<8>(out, group, codes, scale);
  }
}

// `use(i, codes, scale)` for every 32 elements, from x[i] on.
template <class Use>
void each_group(const float* x, int64_t count, Use use) {
  int8_t codes[kTogether][kGroup];
  float scale[kTogether];
  int64_t i = 0;
  for (; i + kTogether * kGroup <= count; i += kTogether * kGroup) {
    quantize_groups(x + i, codes[0], scale);
    for (int k = 0; k < kTogether; ++k) use(i + k * kGroup, codes[k], scale[k]);
  }
  for (; i < count; i += kGroup) {
    *scale = quantize_group(x + i, codes[0]);
    use(i, codes[0], *scale);
  }
}

inline void rows_quantize(const float* x, float factor, int64_t begin, int64_t count, int bits,
                          uint8_t* out) {
  each_group(x, count, [&](int64_t i, const int8_t (&codes)[kGroup], float scale) {
    put_group(out, (begin + i) / kGroup, codes, scale * factor, bits);
  });
}

inline void rows_pad(int64_t in, int bits, uint8_t* out) {
  const int64_t elements = bits == 4 ? Chunk<4>::kElements : Chunk<8>::kElements;
  const int8_t nothing[kGroup] = {};
  for (int64_t i = in; i % elements; i += kGroup) put_group(out, i / kGroup, nothing, 0.0f, bits);
}

// The scales of a chunk, one a lane; `left`: elements of the row from this chunk on.
template <int bits, int group>
Vec::F chunk_scales(const uint8_t* scales, int64_t chunk) {
  constexpr int kElements = Chunk<bits>::kElements;
  constexpr int kCount = kElements / group ? kElements / group : 1;
  return Vec::spread_bf16<kCount>(scales + 2 * (chunk * kElements / group));
}

template <int bits, int group>
Vec::F last_scales(const uint8_t* scales, int64_t chunk, int64_t left) {
  constexpr int kElements = Chunk<bits>::kElements;
  constexpr int kCount = kElements / group ? kElements / group : 1;
  uint8_t some[2 * kCount] = {};
  const int64_t have = (left + group - 1) / group;
  std::memcpy(some, scales + 2 * (chunk * kElements / group),
              static_cast<size_t>(2 * (have < kCount ? have : kCount)));
  return Vec::spread_bf16<kCount>(some);
}

// R rows times N tokens of one chunk.
template <int bits, int R, int N>
inline __attribute__((always_inline)) void add_chunk(const Vec::B (&packed)[R],
                                                     const Vec::F (&scale)[R],
                                                     const uint8_t* const (&x)[N],
                                                     int64_t offset, Vec::F (&acc)[R][N]) {
  using C = Chunk<bits>;
  using Dot = Vec::Dot<bits>;
  for (int t = 0; t < N; ++t) {
    const uint8_t* chunk = x[t] + offset;
    const Vec::I excess = Vec::load_ints(chunk + C::kOffsets);
    const Vec::F x_scale = Vec::load(reinterpret_cast<const float*>(chunk + C::kScales));
    const Vec::B first = Vec::load_bytes(chunk);
    Vec::B second = first;
    if constexpr (bits == 4) second = Vec::load_bytes(chunk + 4 * Vec::L);
    for (int r = 0; r < R; ++r) {
      typename Dot::Acc sum = Dot::start(excess);
      if constexpr (bits == 4) {
        sum = Dot::add(sum, Dot::codes(Vec::low_nibbles(packed[r])), first);
        sum = Dot::add(sum, Dot::codes(Vec::high_nibbles(packed[r])), second);
      } else {
        sum = Dot::add(sum, Dot::codes(packed[r]), first);
      }
      const Vec::F value = Vec::mul(Vec::to_float(Dot::finish(sum, excess)), x_scale);
      acc[r][t] = Vec::fma(value, scale[r], acc[r][t]);
    }
  }
}

// Rows from `first` on, of a block that ends at `end`, and what is fetched from main memory
// meanwhile: rows that stand some 16 KiB behind, or as far into `next` as they are behind the end.
struct Rows {
  const Matrix& m;
  int64_t first, end;
  Next next;

  int64_t distance() const { return (16384 + m.packed_stride - 1) / m.packed_stride; }
  const uint8_t* codes(int64_t r) const { return m.packed + (first + r) * m.packed_stride; }
  const uint8_t* scales(int64_t r) const { return m.scale + (first + r) * m.scale_stride; }
  const uint8_t* codes_ahead(int64_t r) const {
    const int64_t row = first + r + distance();
    if (row < end) return m.packed + row * m.packed_stride;
    return next.codes ? next.codes + (row - end) * m.packed_stride : codes(r);
  }
  const uint8_t* scales_ahead(int64_t r) const {
    const int64_t row = first + r + distance();
    if (row < end) return m.scale + row * m.scale_stride;
    return next.codes ? next.scales + (row - end) * m.scale_stride : scales(r);
  }
};

template <int bits, int group, int R, int N>
void rows_micro(const Rows& rows, const uint8_t* const* tokens, int64_t from, bool add, float* out,
                int64_t ld) {
  using C = Chunk<bits>;
  constexpr int kVector = 4 * Vec::L;
  const int64_t nbytes = rows.m.in * bits / 8, whole = nbytes / kVector, rest = nbytes % kVector;
  const uint8_t *x[N], *codes[R], *scales[R], *ahead[R];
  Vec::F acc[R][N];
  for (int t = 0; t < N; ++t) x[t] = tokens[t] + from;
  for (int r = 0; r < R; ++r) {
    codes[r] = rows.codes(r);
    scales[r] = rows.scales(r);
    ahead[r] = rows.codes_ahead(r);
    for (int t = 0; t < N; ++t) acc[r][t] = Vec::zero();
    for (int64_t line = 0; line < nbytes * 16 / (bits * group); line += 64) {
      moecli::fetch(rows.scales_ahead(r) + line);
    }
  }
  Vec::B b[R];
  Vec::F s[R];
  for (int64_t c = 0; c < whole; ++c) {
    for (int r = 0; r < R; ++r) {
      moecli::fetch(ahead[r] + c * kVector);
      b[r] = Vec::keep(Vec::load_bytes(codes[r] + c * kVector));
      s[r] = chunk_scales<bits, group>(scales[r], c);
    }
    add_chunk<bits, R, N>(b, s, x, c * C::kBytes, acc);
  }
  if (rest) {
    for (int r = 0; r < R; ++r) {
      b[r] = Vec::load_bytes(codes[r] + whole * kVector, rest);
      s[r] = last_scales<bits, group>(scales[r], whole, rest * 8 / bits);
    }
    add_chunk<bits, R, N>(b, s, x, whole * C::kBytes, acc);
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < N; ++t) {
      float* to = out + t * ld + r;
      const float sum = Vec::sum(acc[r][t]);
      *to = add ? *to + sum : sum;
    }
  }
}

// Two tokens: R rows share their activations; of long rows a part at a time, so that these stay in
// the nearest cache.
template <int bits, int group>
void rows_of_two(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* const* x, float* out,
                 int64_t ld, const Next& next) {
  constexpr int R = Vec::L == 16 ? 4 : 2;
  constexpr int64_t kPart = 2048;
  const int64_t part = m.in <= 2 * kPart ? m.in : kPart, end = row0 + rows;
  for (int64_t begin = 0; begin < m.in; begin += part) {
    Matrix piece = m;
    piece.packed += begin * bits / 8;
    piece.scale += begin / group * 2;
    piece.in = m.in - begin < part ? m.in - begin : part;
    const int64_t from = begin / Chunk<bits>::kElements * Chunk<bits>::kBytes;
    const bool last = begin + part >= m.in, add = begin > 0;
    Matrix following = piece;
    following.packed += part * bits / 8;
    following.scale += part / group * 2;
    const Next after = last ? next : Next::of(following, row0);
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
      rows_micro<bits, group, R, 2>({piece, row0 + r, end, after}, x, from, add, out + r, ld);
    }
    for (; r < rows; ++r) {
      rows_micro<bits, group, 1, 2>({piece, row0 + r, end, after}, x, from, add, out + r, ld);
    }
  }
}

// One token: row by row, which is one stream of memory.
template <int bits, int group>
void rows_of(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* const* x, int n,
             float* out, int64_t ld, const Next& next) {
  if (n == 2) return rows_of_two<bits, group>(m, row0, rows, x, out, ld, next);
  for (int64_t r = 0; r < rows; ++r) {
    rows_micro<bits, group, 1, 1>({m, row0 + r, row0 + rows, next}, x, 0, false, out + r, ld);
  }
}

inline void rows_matmul(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* const* x,
                        int n, float* out, int64_t ld, const Next& next) {
  switch (m.bits * 1000 + m.group) {
    case 4032: return rows_of<4, 32>(m, row0, rows, x, n, out, ld, next);
    case 4064: return rows_of<4, 64>(m, row0, rows, x, n, out, ld, next);
    case 4128: return rows_of<4, 128>(m, row0, rows, x, n, out, ld, next);
    case 8032: return rows_of<8, 32>(m, row0, rows, x, n, out, ld, next);
    case 8064: return rows_of<8, 64>(m, row0, rows, x, n, out, ld, next);
    case 8128: return rows_of<8, 128>(m, row0, rows, x, n, out, ld, next);
  }
}

}  // namespace
