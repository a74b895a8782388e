// Knows the routed experts of one layer as phases of items; not how a product is computed.
#pragma once

#include "types.h"

namespace moecli {

// Legend: T tokens, k choices a token, E experts, H hidden.
struct MoeCall {
  const float* hidden;       // [T, H]
  const int64_t* ids;        // [T, k]
  const float* weights;      // [T, k]
  const int64_t* addresses;  // [E]: bytes of an expert, or 0: contributes nothing
  int64_t tokens, choices, experts, hidden_size;
  int64_t intermediate;  // of a whole expert
  int64_t begin, end;    // the intermediate rows that contribute
  int bits, group;
  Activation activation;
  bool weight_on_input;
  float* contributions;  // [T, k, H], or null
  float* sums;           // [T, H], or null: to each row its contributions are added
  const float* biases;   // [E, 2 * intermediate + H]: of gate, up and down; or null
};

// A contribution depends on the tokens that chose this expert and on nothing else. Sums take them
// by ascending expert, so that they do not depend on threads.
void routed_experts(const Kernels& kernels, const MoeCall& call, int threads);

// out [T, H] += contributions [T, k, H], in the order in which `routed_experts` adds them.
void sum_contributions(const Kernels& kernels, const float* contributions, const int64_t* ids,
                       int64_t tokens, int64_t choices, int64_t hidden_size, float* out,
                       int threads);

}  // namespace moecli
