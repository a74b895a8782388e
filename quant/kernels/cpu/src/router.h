// Knows how experts are chosen from a router's logits.
#pragma once

#include "few_product.h"

namespace moecli {

struct Router {
  Weight weight;  // [E, H]
  int64_t top_k;
  bool sigmoid;    // else softmax
  bool normalize;  // the weights of a token's choice sum to one
};

// Of one token: ids [k], the likeliest first, and their weights [k]. Equal ones come in the order
// in which torch.topk has them. logits [E] are overwritten.
void choose(const Router& router, float* logits, int64_t* ids, float* weights);

// Indices of the k largest of `count` values, as torch.topk orders them.
void largest(const float* values, int64_t count, int64_t k, int64_t* ids);

}  // namespace moecli
