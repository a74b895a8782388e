// Knows the C interface of the library: what quant/kernels/cpu/library.py calls, by plain types.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

#include "isa.h"
#include "linear.h"
#include "moe.h"
#include "pool.h"
#include "step.h"

#if defined(_WIN32)
#define MOECLI_API extern "C" __declspec(dllexport)
#else
#define MOECLI_API extern "C" __attribute__((visibility("default")))
#endif

using namespace moecli;

namespace {

// 0, or 1 where memory is short: no exception crosses the border.
template <class Function>
int guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// Changes whenever a signature below does.
MOECLI_API int moecli_abi() { return 8; }

// Name number `index` of the kernels that this processor can run, fastest first, or null.
MOECLI_API const char* moecli_isa(int index) { return kernels_name(index); }

MOECLI_API const void* moecli_kernels(const char* name) { return find_kernels(name); }

// 2 where a choice is no expert; then nothing was computed.
MOECLI_API int moecli_routed_experts(const void* kernels, const MoeCall* call, int threads) {
  for (int64_t i = 0; i < call->tokens * call->choices; ++i) {
    if (call->ids[i] < 0 || call->ids[i] >= call->experts) return 2;
  }
  return guarded([&] { routed_experts(*static_cast<const Kernels*>(kernels), *call, threads); });
}

MOECLI_API int moecli_sum_contributions(const void* kernels, const float* contributions,
                                        const int64_t* ids, int64_t tokens, int64_t choices,
                                        int64_t hidden_size, float* out, int threads) {
  return guarded([&] {
    sum_contributions(*static_cast<const Kernels*>(kernels), contributions, ids, tokens, choices,
                      hidden_size, out, threads);
  });
}

MOECLI_API int moecli_linears(const void* kernels, const float* x, int64_t tokens,
                              const Linear* all, int count, int threads) {
  return guarded(
      [&] { linears(*static_cast<const Kernels*>(kernels), x, tokens, all, count, threads); });
}

MOECLI_API int moecli_linear_float(const void* kernels, const float* x, int64_t tokens,
                                   const uint8_t* weight, int type, int64_t rows, int64_t in,
                                   float* out, int threads) {
  return guarded([&] {
    linear_float(*static_cast<const Kernels*>(kernels), x, tokens, weight,
                 static_cast<FloatType>(type), rows, in, out, threads);
  });
}

// 2 where a weight is not finite, or too large; what was written then means nothing.
MOECLI_API int moecli_search_scales(const void* kernels, const ScaleSearch* search, int threads) {
  constexpr int64_t kGroups = 4096;  // of an item, which are whole rows
  const int64_t rows = std::max<int64_t>(1, kGroups / std::max<int64_t>(1, search->row_groups));
  const Kernels& k = *static_cast<const Kernels*>(kernels);
  std::atomic<bool> fine{true};
  const int code = guarded([&] {
    auto body = [&](int64_t item) {
      const int64_t begin = item * rows, end = std::min(begin + rows, search->rows);
      if (!k.search_scales(*search, begin, end)) fine = false;
    };
    const int64_t items = (search->rows + rows - 1) / rows;
    if (threads <= 1) {  // without the pool, whose callers wait for each other
      for (int64_t item = 0; item < items; ++item) body(item);
      return;
    }
    Pool& pool = Pool::instance();
    const auto lock = pool.acquire();
    const Phase phase = Phase::of(items, body);
    pool.run(threads, &phase, 1);
  });
  return code ? code : fine ? 0 : 2;
}

// `*at`: in which layer the step begins, and then what `step` returns.
MOECLI_API int moecli_step(const void* kernels, const DecoderCall* decoder, const StepCall* call,
                           int64_t* at, const float* delta, int threads) {
  return guarded([&] {
    *at = step(*static_cast<const Kernels*>(kernels), *decoder, *call, *at, delta, threads);
  });
}

MOECLI_API int moecli_mlp(const void* kernels, const MlpCall* call, const float* x, int64_t tokens,
                          float* out, int threads) {
  return guarded([&] { mlp(*static_cast<const Kernels*>(kernels), *call, x, tokens, out, threads); });
}
