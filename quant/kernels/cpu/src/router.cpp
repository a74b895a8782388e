// Knows how experts are chosen; see router.h.
#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace moecli {
namespace {

constexpr float kLeastSum = 1e-20f;  // weights that add up to nothing are not divided by it

// Indices of the k largest of `count` values, as torch.topk orders them.
void largest(const float* values, int64_t count, int64_t k, int64_t* ids) {
  using Value = std::pair<float, int64_t>;
  thread_local std::vector<Value> queue;
  queue.clear();
  for (int64_t i = 0; i < count; ++i) queue.emplace_back(values[i], i);
  // torch.topk takes what is no number for the largest.
  const auto before = [](const Value& a, const Value& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  // The two ways of torch, as its order of equal values depends on them.
  const auto begin = queue.begin(), end = queue.end();
  if (k * 64 <= count) {
    std::partial_sort(begin, begin + k, end, before);
  } else {
    std::nth_element(begin, begin + k - 1, end, before);
    std::sort(begin, begin + k - 1, before);
  }
  for (int64_t i = 0; i < k; ++i) ids[i] = queue[static_cast<size_t>(i)].second;
}

void softmax(float* values, int64_t count) {
  const float most = *std::max_element(values, values + count);
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) total += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Makes -inf of all but the best groups of wanted [count].
void leave_best_groups(const Router& router, float* wanted, int64_t count) {
  const int64_t size = count / router.groups;
  thread_local std::vector<float> worth;
  thread_local std::vector<int64_t> best;
  worth.clear();
  for (int64_t g = 0; g < router.groups; ++g) {
    int64_t two[2];
    largest(wanted + g * size, size, 2, two);
    worth.push_back(wanted[g * size + two[0]] + wanted[g * size + two[1]]);
  }
  best.resize(static_cast<size_t>(router.best_groups));
  largest(worth.data(), router.groups, router.best_groups, best.data());
  for (int64_t g = 0; g < router.groups; ++g) {
    if (std::find(best.begin(), best.end(), g) != best.end()) continue;
    std::fill_n(wanted + g * size, size, -std::numeric_limits<float>::infinity());
  }
}

void choose_grouped(const Router& router, float* logits, int64_t* ids, float* weights) {
  const int64_t count = router.weight.rows;
  thread_local std::vector<float> scores;
  scores.clear();
  for (int64_t i = 0; i < count; ++i) scores.push_back(sigmoid(logits[i]));
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = scores[static_cast<size_t>(i)] + router.correction[i];
  }
  if (router.groups > 1) leave_best_groups(router, logits, count);
  largest(logits, count, router.top_k, ids);
  float total = kLeastSum;
  for (int64_t i = 0; i < router.top_k; ++i) {
    total += weights[i] = scores[static_cast<size_t>(ids[i])];
  }
  for (int64_t i = 0; i < router.top_k; ++i) {
    if (router.normalize) weights[i] /= total;
    weights[i] *= router.scale;
  }
}

}  // namespace

void choose(const Router& router, float* logits, int64_t* ids, float* weights) {
  if (router.kind == kGrouped) return choose_grouped(router, logits, ids, weights);
  const int64_t count = router.weight.rows, k = router.top_k;
  if (router.kind == kSoftmax) softmax(logits, count);
  largest(logits, count, k, ids);
  for (int64_t i = 0; i < k; ++i) weights[i] = logits[ids[i]];
  if (router.kind == kSoftmaxOfChosen) softmax(weights, k);
  float total = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    if (router.kind == kSigmoid) weights[i] = sigmoid(weights[i]);
    total += weights[i];
  }
  for (int64_t i = 0; router.normalize && i < k; ++i) weights[i] /= total;
}

void guess(const Router& router, float* logits, int64_t* ids) {
  const int64_t count = router.weight.rows;
  for (int64_t i = 0; router.kind == kGrouped && i < count; ++i) {
    logits[i] = sigmoid(logits[i]) + router.correction[i];
  }
  largest(logits, count, router.top_k, ids);
}

}  // namespace moecli
