// Knows products for many tokens: L rows are turned on the fly so that a lane is a row, and the
// codes of a token are broadcast; 32 elements are summed as integers before one conversion.
//
// A token by itself ("plain"): codes in the order in which steps take them, 4 a step, then a scale
// and an offset for each 32. A block of n tokens: for each 32 elements, 8 steps of n times 4 codes,
// n scales, n offsets.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"
#include "types.h"

namespace {

using moecli::Blocks;
using moecli::Matrix;

constexpr int kTiles = 32 / Vec::L;  // turned at once: the tokens of a block serve them all

inline int64_t plain_nbytes(int64_t in) { return in + in / kGroup * 8; }

inline int64_t block_nbytes(int64_t in, int n) { return in / kGroup * (kGroup + 8) * n; }

inline void plain_quantize(const float* x, int64_t begin, int64_t count, int bits, uint8_t* out,
                           int64_t in) {
  each_group(x, count, [&](int64_t i, const int8_t (&codes)[kGroup], float scale) {
    const int64_t span = (begin + i) / kGroup;
    int32_t sum = 0;
    for (int j = 0; j < kGroup; ++j) sum += codes[j];
    const int32_t offset =
        -sum * (bits == 4 ? Vec::Dot<4>::kExcess : Vec::Dot<8>::kExcess);
    for (int j = 0; j < kGroup; j += 8) {
      uint64_t eight;
      std::memcpy(&eight, codes + j, 8);
      if (bits == 4) eight = evens_first(eight);
      std::memcpy(out + span * kGroup + j, &eight, 8);
    }
    std::memcpy(out + in + span * 8, &scale, 4);
    std::memcpy(out + in + span * 8 + 4, &offset, 4);
  });
}

inline void block_insert(const uint8_t* plain, int64_t in, int64_t begin, int64_t count,
                         float factor, int slot, int n, uint8_t* out) {
  for (int64_t span = begin; span < begin + count; ++span) {
    uint8_t* to = out + span * (kGroup + 8) * n + 4 * slot;
    const uint8_t* from = plain + span * kGroup;
    for (int step = 0; step < kGroup / 4; ++step) std::memcpy(to + step * 4 * n, from + step * 4, 4);
    float scale;
    std::memcpy(&scale, plain + in + span * 8, 4);
    scale *= factor;
    std::memcpy(to + kGroup * n, &scale, 4);
    std::memcpy(to + kGroup * n + 4 * n, plain + in + span * 8 + 4, 4);
  }
}

// Elements of a row that are summed before the next rows or tokens come: of so many, the codes of
// some tiles stay in the nearest cache. A sum that goes on is the same sum.
constexpr int64_t kPart = 2048;

inline int64_t part_size(int64_t in, int64_t begin) {
  return in - begin < kPart ? in - begin : kPart;
}

// A tile in scratch, or a part of it: vectors of 4 bytes of L rows each, then L scales for each group.
inline int64_t tile_nbytes(int64_t in, int bits) {
  return in * bits / 8 * Vec::L + in / 32 * 4 * Vec::L;
}

inline int64_t tiles_scratch(int64_t in, int bits) {
  return kTiles * tile_nbytes(part_size(in, 0), bits);
}

// Bytes of rows that stand apart; none where `at` is null.
struct Run {
  const uint8_t* at;
  int64_t stride;  // from row to row
  int64_t width;   // bytes of a row
  int64_t rows;

  int64_t lines() const { return at ? rows * ((width + 63) / 64) : 0; }
};

// What is fetched from main memory while products are computed, which leave it idle: codes, scales.
class Fetch {
 public:
  // steps: how often `go_on` will be called
  Fetch(const Run& codes, const Run& scales, int64_t steps)
      : run_(codes), then_(scales), left_(codes.lines()),
        each_((codes.lines() + scales.lines() + steps - 1) / steps) {
    if (!left_) begin_scales();
  }

  inline __attribute__((always_inline)) void go_on() {
    for (int64_t i = 0; i < each_ && left_; ++i) {
      __builtin_prefetch(run_.at + column_, 0, 2);
      column_ += 64;
      if (column_ >= run_.width) column_ = 0, run_.at += run_.stride;
      if (!--left_) begin_scales();
    }
  }

 private:
  void begin_scales() {
    run_ = then_;
    left_ = then_.lines();
    then_.at = nullptr;
    column_ = 0;
  }

  Run run_, then_;
  int64_t left_, each_, column_ = 0;
};

// out[i * L + r] = 4 bytes i of row r; zeros where there are fewer than L rows.
inline void turn_words(const uint8_t* from, int64_t stride, int64_t rows, int64_t words,
                       uint8_t* out) {
  int64_t word = 0;
  for (; rows == Vec::L && word + 4 <= words; word += 4) {
    Vec::transpose(from + 4 * word, stride, out + 4 * word * Vec::L);
  }
  for (; word < words; ++word) {
    for (int64_t r = 0; r < Vec::L; ++r) {
      uint32_t value = 0;
      if (r < rows) std::memcpy(&value, from + r * stride + 4 * word, 4);
      std::memcpy(out + 4 * (word * Vec::L + r), &value, 4);
    }
  }
}

inline void turn_tile(const Matrix& m, int64_t row, int64_t rows, uint8_t* out) {
  constexpr int kVector = 4 * Vec::L;
  const int64_t nbytes = m.in * m.bits / 8;
  turn_words(m.packed + row * m.packed_stride, m.packed_stride, rows, nbytes / 4, out);
  // Scales come in pairs, and become floats in place: what is written stays behind what is read.
  const uint8_t* scales = m.scale + row * m.scale_stride;
  uint8_t* to = out + nbytes * Vec::L;
  const int64_t count = m.in / m.group, pairs = count / 2;
  uint8_t* words = to + (count - pairs) * kVector;
  turn_words(scales, m.scale_stride, rows, pairs, words);
  for (int64_t i = 0; i < pairs; ++i, words += kVector, to += 2 * kVector) {
    const Vec::I pair = Vec::load_ints(words);
    Vec::store(reinterpret_cast<float*>(to), Vec::low_bf16(pair));
    Vec::store(reinterpret_cast<float*>(to + kVector), Vec::high_bf16(pair));
  }
  for (int64_t r = 0; count % 2 && r < Vec::L; ++r) {
    uint16_t last = 0;
    if (r < rows) std::memcpy(&last, scales + r * m.scale_stride + 2 * (count - 1), 2);
    const uint32_t value = uint32_t(last) << 16;
    std::memcpy(to + 4 * r, &value, 4);
  }
}

// Where some tiles, which follow each other, go on.
struct TilePart {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t stride;    // from tile to tile
  int64_t elements;  // whole groups
};

// N tokens of a block times W tiles, which share what is broadcast; `spans`: 32 elements each, in a
// group of the weight.
template <int bits, int spans, int W, int N>
inline __attribute__((always_inline)) void tile_micro(const TilePart& part, const uint8_t* x,
                                                      Fetch& fetch, Vec::F (&acc)[W][N]) {
  using Dot = Vec::Dot<bits>;
  constexpr int kVector = 4 * Vec::L, kSteps = kGroup / 4, kGroupBytes = (kGroup + 8) * N;
  const uint8_t* w = part.codes;
  const uint8_t* scales = part.scales;
  for (int64_t g = 0; g < part.elements / (kGroup * spans); ++g, scales += kVector) {
    Vec::F group[W][N];
    for (int span = 0; span < spans; ++span, x += kGroupBytes) {
      const uint8_t* offsets = x + (kGroup + 4) * N;
      fetch.go_on();
      typename Dot::Acc sum[W][N];
      for (int t = 0; t < N; ++t) {
        const auto start = Dot::start(Vec::repeat_int(offsets + 4 * t));
        for (int i = 0; i < W; ++i) sum[i][t] = start;
      }
      const auto add = [&](const auto (&codes)[W], int step) {
        for (int t = 0; t < N; ++t) {
          Vec::B four = Vec::repeat_4_bytes(x + 4 * (step * N + t));
          if constexpr (W > 1) four = Vec::keep(four);
          for (int i = 0; i < W; ++i) sum[i][t] = Dot::add(sum[i][t], codes[i], four);
        }
      };
      if constexpr (bits == 4) {
        for (int step = 0; step < kSteps; step += 2, w += kVector) {
          typename Dot::W low[W], high[W];
          for (int i = 0; i < W; ++i) {
            const Vec::B b = Vec::keep(Vec::load_bytes(w + i * part.stride));
            low[i] = Dot::codes(Vec::low_nibbles(b));
            high[i] = Dot::codes(Vec::high_nibbles(b));
          }
          add(low, step);
          add(high, step + 1);
        }
      } else {
        for (int step = 0; step < kSteps; ++step, w += kVector) {
          typename Dot::W codes[W];
          for (int i = 0; i < W; ++i) codes[i] = Dot::codes(Vec::load_bytes(w + i * part.stride));
          add(codes, step);
        }
      }
      for (int t = 0; t < N; ++t) {
        float scale;
        std::memcpy(&scale, x + kGroup * N + 4 * t, 4);
        const Vec::F factor = Vec::repeat(scale);
        const Vec::I offset = Vec::repeat_int(offsets + 4 * t);
        for (int i = 0; i < W; ++i) {
          const Vec::F value = Vec::to_float(Dot::finish(sum[i][t], offset));
          group[i][t] = span == 0 ? Vec::mul(value, factor)
                                  : Vec::fma(value, factor, group[i][t]);
        }
      }
    }
    for (int i = 0; i < W; ++i) {
      const Vec::F scale = Vec::load(reinterpret_cast<const float*>(scales + i * part.stride));
      for (int t = 0; t < N; ++t) acc[i][t] = Vec::fma(group[i][t], scale, acc[i][t]);
    }
  }
}

// W tiles; `add`: to what `out` holds. Never inlined: among other loops, some compilers keep sums in
// memory instead of registers, which takes twice as long.
template <int bits, int spans, int W, int N>
__attribute__((noinline)) void tile_block(const TilePart& part, const uint8_t* x, bool add, Fetch& fetch, float* out,
                int64_t ld) {
  Vec::F acc[W][N];
  for (int i = 0; i < W; ++i) {
    for (int t = 0; t < N; ++t) acc[i][t] = Vec::zero();
  }
  if (add) {
    for (int i = 0; i < W; ++i) {
      for (int t = 0; t < N; ++t) acc[i][t] = Vec::load(out + t * ld + i * Vec::L);
    }
  }
  tile_micro<bits, spans, W, N>(part, x, fetch, acc);
  for (int i = 0; i < W; ++i) {
    for (int t = 0; t < N; ++t) Vec::store(out + t * ld + i * Vec::L, acc[i][t]);
  }
}

template <int bits, int spans, int W>
void tile_block(const TilePart& part, const uint8_t* x, int n, bool add, Fetch& fetch, float* out,
                int64_t ld) {
  switch (n) {
    case 1: return tile_block<bits, spans, W, 1>(part, x, add, fetch, out, ld);
    case 2: return tile_block<bits, spans, W, 2>(part, x, add, fetch, out, ld);
    case 3: return tile_block<bits, spans, W, 3>(part, x, add, fetch, out, ld);
    default: return tile_block<bits, spans, W, Vec::kBlock>(part, x, add, fetch, out, ld);
  }
}

// The last rows, fewer than a tile has: by way of memory of their own.
template <int bits, int spans>
void tile_rest(const TilePart& part, int64_t rows, const uint8_t* x, int n, bool add, Fetch& fetch,
               float* out, int64_t ld) {
  float some[Vec::kBlock * Vec::L] = {};
  for (int t = 0; add && t < n; ++t) {
    std::memcpy(some + t * Vec::L, out + t * ld, static_cast<size_t>(rows) * 4);
  }
  tile_block<bits, spans, 1>(part, x, n, add, fetch, some, Vec::L);
  for (int t = 0; t < n; ++t) {
    std::memcpy(out + t * ld, some + t * Vec::L, static_cast<size_t>(rows) * 4);
  }
}

// Some tiles, of a part of their rows, times all tokens.
template <int bits, int spans>
void tiles_part(const uint8_t* scratch, int64_t in, int64_t begin, int64_t rows, const uint8_t* x,
                int n, Fetch& fetch, float* out, int64_t ld) {
  constexpr int W = Vec::kWide;
  const int64_t elements = part_size(in, begin), stride = tile_nbytes(elements, bits);
  const int64_t codes_nbytes = elements * bits / 8 * Vec::L;
  const Blocks blocks(n, Vec::kBlock);
  for (int b = 0; b < blocks.count; ++b) {
    const int first = blocks.first(b), size = blocks.size(b);
    const uint8_t* tokens = x + block_nbytes(in, first) + block_nbytes(begin, size);
    for (int64_t r = 0; r < rows;) {
      const uint8_t* tile = scratch + r / Vec::L * stride;
      const TilePart part = {tile, tile + codes_nbytes, stride, elements};
      float* to = out + first * ld + r;
      if (rows - r >= W * Vec::L) {
        tile_block<bits, spans, W>(part, tokens, size, begin > 0, fetch, to, ld);
        r += W * Vec::L;
      } else if (rows - r >= Vec::L) {
        tile_block<bits, spans, 1>(part, tokens, size, begin > 0, fetch, to, ld);
        r += Vec::L;
      } else {
        tile_rest<bits, spans>(part, rows - r, tokens, size, begin > 0, fetch, to, ld);
        r = rows;
      }
    }
  }
}

// What is turned after a part of some rows: that of more rows, the next part of the first ones, or
// the first part of the next product.
inline Fetch turned_next(const Matrix& m, int64_t row0, int64_t rows, int64_t row, int64_t begin,
                         const Next& next, int64_t steps) {
  constexpr int64_t kRows = kTiles * Vec::L;
  row += kRows;
  if (row >= rows) row = 0, begin += kPart;
  const bool ends = begin >= m.in;
  if (ends) begin = 0;
  const int64_t size = part_size(m.in, begin), count = rows - row < kRows ? rows - row : kRows;
  const uint8_t* codes = m.packed + (row0 + row) * m.packed_stride + begin * m.bits / 8;
  const uint8_t* scales = m.scale + (row0 + row) * m.scale_stride + begin / m.group * 2;
  return Fetch({ends ? next.codes : codes, m.packed_stride, size * m.bits / 8, count},
               {ends ? next.scales : scales, m.scale_stride, size / m.group * 2, count}, steps);
}

// Part by part of the rows, so that what tokens have of a part serves all rows.
template <int bits, int spans>
void tiles_of(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* x, int n, float* out,
              int64_t ld, uint8_t* scratch, const Next& next) {
  constexpr int64_t kRows = kTiles * Vec::L;
  for (int64_t begin = 0; begin < m.in; begin += kPart) {
    Matrix piece = m;
    piece.packed += begin * bits / 8;
    piece.scale += begin / (kGroup * spans) * 2;
    piece.in = part_size(m.in, begin);
    const int64_t stride = tile_nbytes(piece.in, bits);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t some = rows - row < kRows ? rows - row : kRows;
      for (int64_t r = 0; r < some; r += Vec::L) {
        turn_tile(piece, row0 + row + r, some - r < Vec::L ? some - r : Vec::L,
                  scratch + r / Vec::L * stride);
      }
      constexpr int64_t kWideRows = Vec::kWide * Vec::L;
      const int64_t rest = (some % kWideRows + Vec::L - 1) / Vec::L;
      const int64_t steps = (some / kWideRows + rest) * Blocks(n, Vec::kBlock).count;
      Fetch fetch = turned_next(m, row0, rows, row, begin, next, steps * (piece.in / kGroup));
      tiles_part<bits, spans>(scratch, m.in, begin, some, x, n, fetch, out + row, ld);
    }
  }
}

inline void tiles_matmul(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* x, int n,
                         float* out, int64_t ld, uint8_t* scratch, const Next& next) {
  switch (m.bits * 1000 + m.group) {
    case 4032: return tiles_of<4, 1>(m, row0, rows, x, n, out, ld, scratch, next);
    case 4064: return tiles_of<4, 2>(m, row0, rows, x, n, out, ld, scratch, next);
    case 4128: return tiles_of<4, 4>(m, row0, rows, x, n, out, ld, scratch, next);
    case 8032: return tiles_of<8, 1>(m, row0, rows, x, n, out, ld, scratch, next);
    case 8064: return tiles_of<8, 2>(m, row0, rows, x, n, out, ld, scratch, next);
    case 8128: return tiles_of<8, 4>(m, row0, rows, x, n, out, ld, scratch, next);
  }
}

}  // namespace
