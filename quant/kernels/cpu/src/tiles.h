// Knows products for many tokens: L rows are turned on the fly so that a lane is a row, and the
// codes of a token are broadcast; 32 elements are summed as integers before one conversion.
//
// A token by itself ("plain"): codes in the order in which steps take them, 4 a step, then a scale
// and an offset for each 32. A block of n tokens: for each 32 elements, 8 steps of n times 4 codes,
// n scales, n offsets.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace {

using moecli::Blocks;
using moecli::Matrix;

constexpr int kTiles = 64 / Vec::L;  // turned at once: the tokens of a block serve them all

inline int64_t plain_nbytes(int64_t in) { return in + in / kGroup * 8; }

inline int64_t block_nbytes(int64_t in, int n) { return in / kGroup * (kGroup + 8) * n; }

inline void plain_quantize(const float* x, int64_t begin, int64_t count, int bits, uint8_t* out,
                           int64_t in) {
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t span = (begin + i) / kGroup;
    int8_t codes[kGroup];
    const float scale = quantize_group(x + i, codes);
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
  }
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

// A tile in scratch: vectors of 4 bytes of L rows each, then L scales for each group.
inline int64_t tile_nbytes(int64_t in, int bits) {
  return in * bits / 8 * Vec::L + in / 32 * 4 * Vec::L;
}

inline int64_t tiles_scratch(int64_t in, int bits) { return kTiles * tile_nbytes(in, bits); }

// What is fetched from main memory while products are computed, which leave it idle.
struct Fetch {
  const uint8_t* at;
  const uint8_t* end;
  int64_t lines;  // for each 32 elements of a tile and a block

  void go_on() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// out[i * L + r] = 4 bytes i of row r; zeros where there are fewer than L rows.
inline void turn_words(const uint8_t* from, int64_t stride, int64_t rows, int64_t words,
                       uint8_t* out) {
  int64_t word = 0;
  for (; rows == Vec::L && word + Vec::L <= words; word += Vec::L) {
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

// N tokens of a block times one tile; `spans`: 32 elements each, in a group of the weight.
template <int bits, int spans, int N>
void tile_micro(const uint8_t* tile, int64_t in, const uint8_t* x, Fetch& fetch,
                Vec::F (&acc)[N]) {
  using Dot = Vec::Dot<bits>;
  constexpr int kVector = 4 * Vec::L, kSteps = kGroup / 4, kGroupBytes = (kGroup + 8) * N;
  const uint8_t* w = tile;
  const float* scales = reinterpret_cast<const float*>(tile + in * bits / 8 * Vec::L);
  for (int t = 0; t < N; ++t) acc[t] = Vec::zero();
  for (int64_t g = 0; g < in / (kGroup * spans); ++g, scales += Vec::L) {
    Vec::F group[N];
    for (int span = 0; span < spans; ++span, x += kGroupBytes) {
      const uint8_t* offsets = x + (kGroup + 4) * N;
      fetch.go_on();
      typename Dot::Acc sum[N];
      for (int t = 0; t < N; ++t) sum[t] = Dot::start(Vec::repeat_int(offsets + 4 * t));
      if constexpr (bits == 4) {
        for (int step = 0; step < kSteps; step += 2, w += kVector) {
          const Vec::B b = Vec::load_bytes(w);
          const auto low = Dot::codes(Vec::low_nibbles(b));
          const auto high = Dot::codes(Vec::high_nibbles(b));
          for (int t = 0; t < N; ++t) {
            sum[t] = Dot::add(sum[t], low, Vec::repeat_4_bytes(x + 4 * (step * N + t)));
          }
          for (int t = 0; t < N; ++t) {
            sum[t] = Dot::add(sum[t], high, Vec::repeat_4_bytes(x + 4 * ((step + 1) * N + t)));
          }
        }
      } else {
        for (int step = 0; step < kSteps; ++step, w += kVector) {
          const auto codes = Dot::codes(Vec::load_bytes(w));
          for (int t = 0; t < N; ++t) {
            sum[t] = Dot::add(sum[t], codes, Vec::repeat_4_bytes(x + 4 * (step * N + t)));
          }
        }
      }
      for (int t = 0; t < N; ++t) {
        float scale;
        std::memcpy(&scale, x + kGroup * N + 4 * t, 4);
        const Vec::F value =
            Vec::to_float(Dot::finish(sum[t], Vec::repeat_int(offsets + 4 * t)));
        group[t] = span == 0 ? Vec::mul(value, Vec::repeat(scale))
                             : Vec::fma(value, Vec::repeat(scale), group[t]);
      }
    }
    const Vec::F weight_scale = Vec::load(scales);
    for (int t = 0; t < N; ++t) acc[t] = Vec::fma(group[t], weight_scale, acc[t]);
  }
}

template <int bits, int spans, int N>
void tile_block(const uint8_t* tile, int64_t in, int64_t rows, const uint8_t* x, Fetch& fetch,
                float* out, int64_t ld) {
  Vec::F acc[N];
  tile_micro<bits, spans, N>(tile, in, x, fetch, acc);
  for (int t = 0; t < N; ++t) {
    if (rows == Vec::L) {
      Vec::store(out + t * ld, acc[t]);
    } else {
      float some[Vec::L];
      Vec::store(some, acc[t]);
      for (int64_t r = 0; r < rows; ++r) out[t * ld + r] = some[r];
    }
  }
}

template <int bits, int spans>
void tiles_of(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* x, int n, float* out,
              int64_t ld, uint8_t* scratch, const uint8_t* next) {
  const int64_t stride = tile_nbytes(m.in, bits);
  for (int64_t r = 0; r < rows; r += Vec::L) {
    const int64_t some = rows - r < Vec::L ? rows - r : Vec::L;
    turn_tile(m, row0 + r, some, scratch + r / Vec::L * stride);
  }
  const Blocks blocks(n, Vec::kBlock);
  const int64_t tiles = (rows + Vec::L - 1) / Vec::L, nbytes = next ? rows * m.packed_stride : 0;
  const int64_t steps = tiles * blocks.count * (m.in / kGroup);
  Fetch fetch = {next, next + nbytes, (nbytes / 64 + steps - 1) / steps};
  for (int b = 0; b < blocks.count; ++b) {
    const int size = blocks.size(b);
    for (int64_t r = 0; r < rows; r += Vec::L) {
      const int64_t some = rows - r < Vec::L ? rows - r : Vec::L;
      const uint8_t* tile = scratch + r / Vec::L * stride;
      float* to = out + blocks.first(b) * ld + r;
      switch (size) {
        case 1: tile_block<bits, spans, 1>(tile, m.in, some, x, fetch, to, ld); break;
        case 2: tile_block<bits, spans, 2>(tile, m.in, some, x, fetch, to, ld); break;
        case 3: tile_block<bits, spans, 3>(tile, m.in, some, x, fetch, to, ld); break;
        case 4: tile_block<bits, spans, 4>(tile, m.in, some, x, fetch, to, ld); break;
        default:
          if constexpr (Vec::kBlock == 8) {
            switch (size) {
              case 5: tile_block<bits, spans, 5>(tile, m.in, some, x, fetch, to, ld); break;
              case 6: tile_block<bits, spans, 6>(tile, m.in, some, x, fetch, to, ld); break;
              case 7: tile_block<bits, spans, 7>(tile, m.in, some, x, fetch, to, ld); break;
              default: tile_block<bits, spans, 8>(tile, m.in, some, x, fetch, to, ld); break;
            }
          }
      }
    }
    x += block_nbytes(m.in, size);
  }
}

inline void tiles_matmul(const Matrix& m, int64_t row0, int64_t rows, const uint8_t* x, int n,
                         float* out, int64_t ld, uint8_t* scratch, const uint8_t* next) {
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
