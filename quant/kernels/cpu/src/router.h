// Knows how experts are chosen from a router's logits.
#pragma once

#include "few_product.h"

namespace moecli {

// What makes logits weights. "Grouped": experts are chosen by sigmoid and correction, in the best
// groups alone, of which each is as good as its two best experts together; weights are by sigmoid.
enum RouterKind { kSoftmax = 0, kSigmoid = 1, kSoftmaxOfChosen = 2, kGrouped = 3 };

struct Router {
  Weight weight;  // [E, H]
  int64_t top_k;
  RouterKind kind;
  bool normalize;  // the weights of a token's choice sum to one
  // Of kGrouped alone:
  const float* correction;      // [E]
  int64_t groups, best_groups;  // of as many experts each, and how many of them are chosen from
  float scale;                  // by which weights are multiplied in the end
};

// Of one token: ids [k], the likeliest first, and their weights [k]. Equal ones come in the order
// in which torch.topk has them. logits [E] are overwritten.
void choose(const Router& router, float* logits, int64_t* ids, float* weights);

// Of one token: ids [k] of those that it would probably choose. logits [E] are overwritten.
void guess(const Router& router, float* logits, int64_t* ids);

}  // namespace moecli
