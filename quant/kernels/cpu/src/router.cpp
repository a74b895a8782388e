// Knows how experts are chosen; see router.h.
#include "router.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace moecli {

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

void choose(const Router& router, float* logits, int64_t* ids, float* weights) {
  const int64_t count = router.weight.rows;
  if (!router.sigmoid) {
    const float most = *std::max_element(logits, logits + count);
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += logits[i] = std::exp(logits[i] - most);
    for (int64_t i = 0; i < count; ++i) logits[i] /= total;
  }
  largest(logits, count, router.top_k, ids);
  float total = 0.0f;
  for (int64_t i = 0; i < router.top_k; ++i) {
    const float value = logits[ids[i]];
    total += weights[i] = router.sigmoid ? 1.0f / (1.0f + std::exp(-value)) : value;
  }
  for (int64_t i = 0; router.normalize && i < router.top_k; ++i) weights[i] /= total;
}

}  // namespace moecli
