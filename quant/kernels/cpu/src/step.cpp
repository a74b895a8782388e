// Knows a decoder's step of few tokens; see step.h.
#include "step.h"

#include <algorithm>

#include "linear.h"

namespace moecli {
namespace {

struct Step {
  const Kernels& k;
  const DecoderCall& decoder;
  const StepCall& s;
  int threads;

  int64_t hidden_size() const { return decoder.blocks[0]->layer.hidden_size; }
  bool finish(const Block& block) const;
  bool all_here(const Block& block, const int64_t* ids) const;
  void count(const Block& block, const int64_t* ids) const;
  void add_experts(const Block& block, const int64_t* ids) const;
  void logits() const;
};

// What follows attention, into `delta`; false where that is somebody else's business.
bool Step::finish(const Block& block) const {
  const Router& router = block.layer.router;
  const int64_t* ids = s.ids + block.layer.index * s.tokens * router.top_k;
  const bool routed = router.weight.rows > 0;
  if (!block.whole || (routed && !all_here(block, ids))) return false;
  if (block.mlp.gate.rows) {
    mlp(k, block.mlp, s.normed, s.tokens, s.delta, threads);
  } else {
    std::fill(s.delta, s.delta + s.tokens * hidden_size(), 0.0f);
  }
  if (routed) {
    count(block, ids);
    add_experts(block, ids);
  }
  return true;
}

bool Step::all_here(const Block& block, const int64_t* ids) const {
  const int64_t* addresses = block.experts.addresses;
  const int64_t all = s.tokens * block.layer.router.top_k;
  return addresses && std::all_of(ids, ids + all, [&](int64_t id) { return addresses[id] != 0; });
}

void Step::count(const Block& block, const int64_t* ids) const {
  const int64_t all = s.tokens * block.layer.router.top_k;
  for (int64_t i = 0; i < all; ++i) {
    if (std::find(ids, ids + i, ids[i]) != ids + i) continue;  // another token's choice, too
    ++block.experts.asked[ids[i]];
    ++*block.experts.hits;
  }
}

void Step::add_experts(const Block& block, const int64_t* ids) const {
  const Residents& e = block.experts;
  const int64_t top_k = block.layer.router.top_k;
  MoeCall call = {};
  call.hidden = s.normed, call.ids = ids, call.addresses = e.addresses;
  call.weights = s.weights + block.layer.index * s.tokens * top_k;
  call.tokens = s.tokens, call.choices = top_k, call.experts = e.experts;
  call.hidden_size = hidden_size(), call.intermediate = call.end = e.intermediate;
  call.bits = e.bits, call.group = e.group, call.activation = e.activation;
  call.weight_on_input = e.weight_on_input, call.biases = e.biases;
  call.sums = s.delta;
  routed_experts(k, call, threads);
}

void Step::logits() const {
  const int64_t size = hidden_size();
  for (int64_t r = 0; r < s.row_count; ++r) {
    float* hidden = s.hidden + s.rows[r] * size;
    k.add_scaled(s.delta + s.rows[r] * size, 1.0f, hidden, size);
    k.rms_norm(hidden, decoder.norm, decoder.eps, s.normed + r * size, size);
  }
  const Weight& head = decoder.head;
  if (head.rows && head.quantized()) {
    const Linear one = {head.matrix, head.rows, s.logits};
    linears(k, s.normed, s.row_count, &one, 1, threads);
  } else if (head.rows) {
    linear_float(k, s.normed, s.row_count, head.matrix.packed, static_cast<FloatType>(head.type),
                 head.rows, size, s.logits, threads);
  }
}

}  // namespace

int64_t step(const Kernels& kernels, const DecoderCall& decoder, const StepCall& call,
             int64_t first, const float* delta, int threads) {
  const Step step = {kernels, decoder, call, threads};
  for (int64_t i = first; i < decoder.count; ++i) {
    const Block& block = *decoder.blocks[i];
    layer(kernels, block.layer, call, delta, threads);
    if (!step.finish(block)) return i;
    delta = call.delta;
  }
  if (delta != call.delta) std::copy(delta, delta + call.tokens * step.hidden_size(), call.delta);
  if (call.row_count) step.logits();
  return decoder.count;
}

}  // namespace moecli
