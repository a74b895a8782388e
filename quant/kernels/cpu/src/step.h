// Knows a decoder's step of few tokens: layer after layer, as far as experts lie somewhere, and the
// logits behind them.
//
// Legend: T tokens, H hidden, E experts, R rows whose logits are wanted, V vocabulary.
#pragma once

#include "layer.h"
#include "moe.h"

namespace moecli {

// The routed experts of a layer, used where they lie: what came once stays for good.
struct Residents {
  const int64_t* addresses;  // [E]: 0: has not come; null: all are somebody else's business
  int64_t* asked;            // [E]: one more for each that a step wants
  int64_t* hits;             // grows by how many that are
  int64_t experts, intermediate;
  int bits, group;
  Activation activation;
  bool weight_on_input;
  const float* biases;  // as `MoeCall` has it
};

struct Block {
  LayerCall layer;
  MlpCall mlp;  // of all tokens; no weights: there is none
  Residents experts;
  bool whole;  // else only attention and the choice of experts are computed here
};

struct DecoderCall {
  int64_t count;
  const Block* const* blocks;
  const float* norm;  // [H]
  float eps;
  Weight head;  // [V, H]; no weight: it is somebody else's business
};

// The layers from `first` on; before it `delta` [T, H] is added, or nothing where that is null.
// Returns which layer's MLP or experts must be computed elsewhere, before the next one: `step` has
// what they take. Or `count`, and then `step.delta` is what the last layer adds; where rows are
// wanted, `step.normed` [R, H] becomes what the head takes of them, and `step.logits` what it gives.
int64_t step(const Kernels& kernels, const DecoderCall& decoder, const StepCall& step,
             int64_t first, const float* delta, int threads);

}  // namespace moecli
