// Multiplies by the compiled kernels, every variant that the processor runs, and by plain loops in
// double precision. For processors that the tests in Python do not run on: see test_quant_arm.py.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "linear.h"
#include "moe.h"

using moecli::Linear;
using moecli::Matrix;
using moecli::MoeCall;
using moecli::ScaleSearch;

extern "C" const char* moecli_isa(int index);
extern "C" const void* moecli_kernels(const char* name);
extern "C" int moecli_linears(const void* kernels, const float* x, int64_t tokens,
                              const Linear* all, int count, int threads);
extern "C" int moecli_routed_experts(const void* kernels, const MoeCall* call, int threads);
extern "C" int moecli_search_scales(const void* kernels, const ScaleSearch* search, int threads);

namespace {

std::mt19937 source;

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> out(static_cast<size_t>(count));
  for (float& value : out) value = distribution(source);
  return out;
}

float bf16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// A weight [rows, in] at `bytes`: codes, then scales of either sign that keep products near one.
struct Weight {
  int64_t rows, in;
  int bits, group;

  int64_t codes_nbytes() const { return rows * in * bits / 8; }
  int64_t nbytes() const { return codes_nbytes() + rows * in / group * 2; }
  Matrix matrix(const uint8_t* bytes) const {
    return {bytes, bytes + codes_nbytes(), in * bits / 8, in / group * 2, in, bits, group};
  }
  void fill(uint8_t* bytes) const {
    for (int64_t i = 0; i < codes_nbytes(); ++i) bytes[i] = static_cast<uint8_t>(source());
    for (int64_t i = 0; i < rows * in / group; ++i) {
      const float spread = bits == 4 ? 4.6f : 74.0f;
      float scale = (0.5f + float(source() % 100) / 100) / (spread * std::sqrt(float(in)));
      if (source() % 2) scale = -scale;
      uint32_t word;
      std::memcpy(&word, &scale, 4);
      const uint16_t half = static_cast<uint16_t>(word >> 16);
      std::memcpy(bytes + codes_nbytes() + 2 * i, &half, 2);
    }
  }
  double at(const uint8_t* bytes, int64_t row, int64_t i) const {
    const int64_t element = row * in + i;
    const int code = bits == 8 ? bytes[element] : bytes[element / 2] >> (element % 2 * 4) & 15;
    uint16_t scale;
    std::memcpy(&scale, bytes + codes_nbytes() + 2 * (element / group), 2);
    return double(code - (1 << (bits - 1))) * bf16(scale);
  }
  std::vector<double> times(const uint8_t* bytes, const double* x) const {
    std::vector<double> out(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < in; ++i) out[size_t(r)] += at(bytes, r, i) * x[i];
    }
    return out;
  }
};

struct Error {
  double off = 0, all = 0;
  void add(double found, double exact) {
    off += (found - exact) * (found - exact);
    all += exact * exact;
  }
  double relative() const { return std::sqrt(off / all); }
};

void product(const void* kernels, Weight w, int64_t tokens, Error& error) {
  std::vector<uint8_t> bytes(size_t(w.nbytes()) + 1);
  uint8_t* at = bytes.data() + 1;  // no alignment is promised
  w.fill(at);
  const std::vector<float> x = normal(tokens * w.in);
  std::vector<float> out(size_t(tokens * w.rows), NAN);
  const Linear linear = {w.matrix(at), w.rows, out.data()};
  moecli_linears(kernels, x.data(), tokens, &linear, 1, 2);
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<double> wide(x.begin() + t * w.in, x.begin() + (t + 1) * w.in);
    const std::vector<double> exact = w.times(at, wide.data());
    for (int64_t r = 0; r < w.rows; ++r) error.add(out[size_t(t * w.rows + r)], exact[size_t(r)]);
  }
}

void experts(const void* kernels, int bits, int group, int64_t tokens, Error& error) {
  constexpr int64_t kExperts = 3, kHidden = 256, kInner = 128;
  const Weight wide = {kInner, kHidden, bits, group}, down = {kHidden, kInner, bits, group};
  std::vector<std::vector<uint8_t>> blobs;
  std::vector<int64_t> addresses, ids;
  for (int64_t e = 0; e < kExperts; ++e) {
    std::vector<uint8_t> blob(size_t(2 * wide.nbytes() + down.nbytes()));
    wide.fill(blob.data());
    wide.fill(blob.data() + wide.nbytes());
    down.fill(blob.data() + 2 * wide.nbytes());
    blobs.push_back(std::move(blob));
    addresses.push_back(reinterpret_cast<int64_t>(blobs.back().data()));
  }
  const std::vector<float> x = normal(tokens * kHidden), weights(size_t(2 * tokens), 0.5f);
  for (int64_t t = 0; t < tokens; ++t) ids.insert(ids.end(), {t % 3, (t + 1) % 3});
  std::vector<float> sums(size_t(tokens * kHidden));
  MoeCall call = {};
  call.hidden = x.data(), call.ids = ids.data(), call.weights = weights.data();
  call.addresses = addresses.data(), call.tokens = tokens, call.choices = 2;
  call.experts = kExperts, call.hidden_size = kHidden, call.intermediate = call.end = kInner;
  call.bits = bits, call.group = group, call.sums = sums.data();
  moecli_routed_experts(kernels, &call, 2);
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<double> token(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
    std::vector<double> exact(size_t(kHidden), 0.0);
    for (int j = 0; j < 2; ++j) {
      const uint8_t* blob = blobs[size_t(ids[size_t(2 * t + j)])].data();
      std::vector<double> inner = wide.times(blob, token.data());
      const std::vector<double> up = wide.times(blob + wide.nbytes(), token.data());
      for (size_t i = 0; i < inner.size(); ++i) inner[i] *= up[i] / (1 + std::exp(-inner[i]));
      const std::vector<double> y = down.times(blob + 2 * wide.nbytes(), inner.data());
      for (size_t i = 0; i < y.size(); ++i) exact[i] += 0.5 * y[i];
    }
    for (int64_t i = 0; i < kHidden; ++i) error.add(sums[size_t(t * kHidden + i)], exact[size_t(i)]);
  }
}

// Quantizes a weight; what came of it goes into `hash`, byte by byte.
void search(const void* kernels, int bits, int group, Error& error, uint64_t& hash) {
  constexpr int64_t kRows = 11, kIn = 384;
  const std::vector<float> weight = normal(kRows * kIn);
  std::vector<uint8_t> packed(size_t(kRows * kIn * bits / 8));
  std::vector<uint16_t> scales(size_t(kRows * kIn / group));
  std::vector<double> errors(static_cast<size_t>(kRows)), squares(errors);
  const int32_t factors[] = {8 * 2048, 17 * 1024, 15 * 1024};
  ScaleSearch call = {};
  call.weight = reinterpret_cast<const uint8_t*>(weight.data());
  call.type = moecli::kFloat32, call.rows = kRows, call.row_groups = kIn / group;
  call.bits = bits, call.group = group, call.factors = factors, call.count = 3;
  call.first_step = -1, call.end_step = 3;
  call.packed = packed.data(), call.scale = scales.data();
  call.row_errors = errors.data(), call.row_squares = squares.data();
  moecli_search_scales(kernels, &call, 2);
  const auto take = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
  for (const uint8_t byte : packed) take(byte);
  for (const uint16_t scale : scales) take(scale);
  for (int64_t i = 0; i < kRows * kIn; ++i) {
    const int code = bits == 8 ? packed[size_t(i)] : packed[size_t(i / 2)] >> (i % 2 * 4) & 15;
    error.add(double(code - (1 << (bits - 1))) * bf16(scales[size_t(i / group)]), weight[size_t(i)]);
  }
}

// One line for each variant: its name, the relative errors of all products, of all experts and of
// all quantized weights, and a number that stands for these.
void report(const char* name) {
  const void* kernels = moecli_kernels(name);
  Error linear, layer, weights;
  uint64_t hash = 0;
  source.seed(1);
  for (const int bits : {4, 8}) {
    for (const int group : {32, 64, 128}) {
      for (const int64_t tokens : {1, 2, 3, 5, 6, 9, 17}) {
        product(kernels, {37, 384, bits, group}, tokens, linear);
        experts(kernels, bits, group, tokens, layer);
      }
      search(kernels, bits, group, weights, hash);
      product(kernels, {8, 2176, bits, group}, 1, linear);
      product(kernels, {41, 4224, bits, group}, 9, linear);
    }
  }
  std::printf("%s %.7f %.7f %.7f %llx\n", name, linear.relative(), layer.relative(),
              weights.relative(), static_cast<unsigned long long>(hash));
}

}  // namespace

int main() {
  for (int i = 0; const char* name = moecli_isa(i); ++i) report(name);
}
