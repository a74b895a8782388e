// Knows what few tokens pass through in a layer, its routed experts excepted.
//
// Legend: T tokens, at most kMostTokens, H hidden, N query heads, K key heads, D head size, E experts,
// k experts a token.
#pragma once

#include "few_product.h"
#include "router.h"

namespace moecli {

// Where one sequence keeps a layer's keys and values, [K, slots, D] each.
struct Place {
  uint8_t* keys;
  uint8_t* values;
  uint8_t* key_scales;    // [K, slots] in bf16, of integers; else null
  uint8_t* value_scales;
  int64_t head_stride;    // bytes from head to head
  int64_t scale_stride;
  int64_t ring;           // a position's slot is position % ring; 0: the position itself
  KeptType type;
  bool window;            // one sees all of the ring, in any order; else up to the own slot
};

enum HeadNorm { kNoNorm = 0, kBeforeRope = 1, kAfterRope = 2 };

// What one layer is, for as long as there is a model.
struct LayerCall {
  int64_t index;  // which of a sequence's places
  int64_t hidden_size, heads, kv_heads, head_size;
  int64_t turned;  // how many elements of a head RoPE turns, its first ones
  Rope rope;
  HeadNorm norm;
  bool tempered;
  float eps;
  const float* input_norm;  // [H]
  const float* head_norm;   // [N + K, D], or null
  const float* sinks;       // [N]: scores that take weight and give no value; or null
  const float* post_norm;   // [H]
  Weight q, k, v, o;
  Router router;            // no weight: there are no experts
  Router guess;             // of the layer that follows; no weight: nobody guesses
  const float* guess_norm;  // [H]
};

// What all layers of one step share; see step.h.
struct StepCall {
  int64_t tokens;
  const int64_t* positions;    // [T]
  const float* turns;          // [T, turned / 2, 2]
  const float* temperature;    // [T], or null
  const Place* const* places;  // [T]: each the places of its sequence, by layer
  float* hidden;               // [T, H]
  float* normed;               // [T, H]
  float* delta;                // [T, H]: what the layer computed last adds to `hidden`
  int64_t* ids;                // [layers, T, k]
  float* weights;              // [layers, T, k]
  int64_t* guesses;            // [layers, T, k of the guess]
  int64_t row_count;
  const int64_t* rows;  // [R]: tokens whose logits are wanted, ascending
  float* logits;        // [R, V]
};

struct MlpCall {
  Weight gate, up, down;  // one kind all three, gate and up of equal bits
  Activation activation;
};

// hidden += delta [T, H], or nothing where that is null, and then attention; `normed` is what the
// layer's MLP or experts take, `ids` and `weights` the choice of these. Tokens of one sequence
// follow each other and do not cross the border of a ring.
void layer(const Kernels& kernels, const LayerCall& call, const StepCall& step, const float* delta,
           int threads);

// out [T, H] = down(activation(gate(x)) * up(x)), of x [T, H].
void mlp(const Kernels& kernels, const MlpCall& call, const float* x, int64_t tokens, float* out,
         int threads);

}  // namespace moecli
