// Products of many tokens in cache, on one thread with AVX512-VNNI, beside what its units can do.
//
//   g++ -std=c++17 -O3 -ffp-contract=off -fno-math-errno -march=native -w -I quant/kernels/cpu/src \
//       benchmarks/cpu_tiles.cpp -o build/cpu_tiles && build/cpu_tiles
//
// The ceiling is a loop of independent VPDPBUSD on registers: 128 operations each. Figures are the
// best of several repeats, by the thread's own time.
#include "vector_avx512.h"
#include "groups_x86.h"
#include "kernels.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

namespace {

constexpr int kRepeats = 15;
constexpr int64_t kRows = 64;

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

template <class Work>
double best_seconds(int64_t count, Work work) {
  double best = 1e9;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const double begin = now();
    for (int64_t i = 0; i < count; ++i) work();
    best = std::min(best, (now() - begin) / count);
  }
  return best;
}

#define ONE(i) "vpdpbusd %zmm30, %zmm31, %zmm" #i "\n"
#define SIXTEEN                                                                             \
  ONE(0) ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12) \
      ONE(13) ONE(14) ONE(15)

double ceiling() {  // operations a second
  const auto work = [] { asm volatile(SIXTEEN SIXTEEN SIXTEEN SIXTEEN); };
  return 64 * 128 / best_seconds(200000, work);
}

double product(int64_t in, int n, int bits, int group) {  // operations a second
  std::vector<uint8_t> packed(kRows * in * bits / 8), scale(kRows * in / group * 2);
  for (uint8_t& byte : packed) byte = static_cast<uint8_t>(rand());
  for (size_t i = 1; i < scale.size(); i += 2) scale[i] = 0x3c;
  const moecli::Matrix m = {packed.data(), scale.data(), in * bits / 8, in / group * 2,
                            in,            bits,         group};
  const moecli::Blocks blocks(n, Vec::kBlock);
  std::vector<uint8_t> x(block_nbytes(in, n)), plain(plain_nbytes(in)), scratch(tiles_scratch(in, bits));
  std::vector<float> values(in), out(n * kRows);
  for (int t = 0, b = 0; b < blocks.count; ++b) {
    for (int slot = 0; slot < blocks.size(b); ++slot, ++t) {
      for (float& value : values) value = static_cast<float>(rand()) / RAND_MAX - 0.5f;
      plain_quantize(values.data(), 0, in, bits, plain.data(), in);
      block_insert(plain.data(), in, 0, in / 32, 1.0f, slot, blocks.size(b),
                   x.data() + block_nbytes(in, blocks.first(b)));
    }
  }
  const auto work = [&] {
    tiles_matmul(m, 0, kRows, x.data(), n, out.data(), kRows, scratch.data(), nullptr);
  };
  const double operations = 2.0 * kRows * in * n;
  return operations / best_seconds(std::max(1.0, 4e8 / operations), work);
}

}  // namespace

int main() {
  const double most = ceiling();
  std::printf("| 64 rows of | tokens | scheme | GFLOP/s | of %.0f |\n|---|---|---|---|---|\n", most / 1e9);
  const struct { int64_t in; int n; } shapes[] = {{2048, 8}, {2048, 32}, {5120, 32}, {4096, 128}};
  const struct { int bits, group; } schemes[] = {{4, 32}, {4, 128}, {8, 128}};
  for (const auto& shape : shapes) {
    for (const auto& scheme : schemes) {
      const double found = product(shape.in, shape.n, scheme.bits, scheme.group);
      std::printf("| %lld | %d | int%d-g%d | %.0f | %.0f%% |\n", static_cast<long long>(shape.in),
                  shape.n, scheme.bits, scheme.group, found / 1e9, 100 * found / most);
    }
  }
}
