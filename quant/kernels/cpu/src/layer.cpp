// Knows the phases of a layer, its routed experts excepted; see layer.h.
#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace moecli {
namespace {

int64_t aligned(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

// Memory of one call: first measured, then handed out.
class Memory {
 public:
  int64_t reserve(int64_t nbytes) {
    const int64_t at = nbytes_;
    nbytes_ += aligned(nbytes);
    return at;
  }
  void take(Pool& pool) { base_ = pool.workspace(nbytes_); }
  uint8_t* bytes(int64_t at) const { return base_ + at; }
  float* floats(int64_t at) const { return reinterpret_cast<float*>(base_ + at); }

 private:
  int64_t nbytes_ = 0;
  uint8_t* base_ = nullptr;
};

struct Layer {
  const Kernels& k;
  const LayerCall& c;
  const StepCall& s;
  const float* delta;
  const int64_t group, padded, splits;  // splits: of the token that sees most
  float *input = nullptr, *q = nullptr, *keys = nullptr, *values = nullptr;
  float* queries = nullptr;   // [T, N, P]
  float* partial = nullptr;   // [T, K, splits, group, P + 2]
  float* attended = nullptr;  // [T, N, D]
  float* added = nullptr;     // [T, H]
  float *logits = nullptr, *guess_input = nullptr, *guess_logits = nullptr;

  Layer(const Kernels& kernels, const LayerCall& call, const StepCall& step, const float* add)
      : k(kernels), c(call), s(step), delta(add), group(call.heads / call.kv_heads),
        padded(padded_size(call.head_size)), splits(most_splits()) {}

  const Place& place(int64_t t) const { return s.places[t][c.index]; }
  int64_t slot(int64_t t) const {
    const int64_t ring = place(t).ring;
    return ring ? s.positions[t] % ring : s.positions[t];
  }
  // How many slots, from the first on, a token looks at.
  int64_t seen(int64_t t) const {
    return place(t).window ? std::min(s.positions[t] + 1, place(t).ring) : slot(t) + 1;
  }
  int64_t splits_of(int64_t t) const { return (seen(t) - 1) / kSplit + 1; }
  int64_t most_splits() const {
    int64_t most = 1;
    for (int64_t t = 0; t < s.tokens; ++t) most = std::max(most, splits_of(t));
    return most;
  }
  // Of a head's slots from one on; of integers alone.
  static uint8_t* scales(uint8_t* all, const Place& at, int64_t head, int64_t slot) {
    return all ? all + head * at.scale_stride + slot * 2 : nullptr;
  }
  int64_t partial_size() const { return group * (padded + 2); }
  // Whether a head's key and value are nobody else's concern, and few enough for one thread.
  bool heads_by_themselves() const { return s.tokens == 1 && splits == 1; }
  bool guesses() const { return c.guess.weight.rows > 0; }

  void begin(int64_t t) const;
  void position(int64_t item) const;
  void position_head(int64_t t, int64_t head, float* x) const;
  void attend(int64_t item) const;
  void combine(int64_t item) const;
  void normalize(int64_t t) const;
  void choose_experts(int64_t t) const;
};

void Layer::begin(int64_t t) const {
  float* hidden = s.hidden + t * c.hidden_size;
  if (delta) k.add_scaled(delta + t * c.hidden_size, 1.0f, hidden, c.hidden_size);
  k.rms_norm(hidden, c.input_norm, c.eps, input + t * c.hidden_size, c.hidden_size);
}

// Item: a token and one of its key heads, with the queries of that.
void Layer::position(int64_t item) const {
  const int64_t t = item / c.kv_heads, head = item % c.kv_heads, size = c.head_size;
  const float factor = c.tempered && s.temperature ? s.temperature[t] : 1.0f;
  const float scale = factor / std::sqrt(static_cast<float>(size));
  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    float* x = q + (t * c.heads + h) * size;
    float* out = queries + (t * c.heads + h) * padded;
    position_head(t, h, x);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale;
    std::fill(out + size, out + padded, 0.0f);
  }
  float* key = keys + (t * c.kv_heads + head) * size;
  position_head(t, c.heads + head, key);
  const Place& at = place(t);
  const float* value = values + (t * c.kv_heads + head) * size;
  const int64_t offset = head * at.head_stride + slot(t) * size * kept_nbytes(at.type);
  uint8_t* const key_scale = scales(at.key_scales, at, head, slot(t));
  uint8_t* const value_scale = scales(at.value_scales, at, head, slot(t));
  k.store_head(key, at.type, at.keys + offset, key_scale, size);
  k.store_head(value, at.type, at.values + offset, value_scale, size);
}

void Layer::position_head(int64_t t, int64_t head, float* x) const {
  const int64_t size = c.head_size;
  const float* weight = c.head_norm ? c.head_norm + head * size : nullptr;
  if (c.norm == kBeforeRope) k.rms_norm(x, weight, c.eps, x, size);
  if (c.rope != kNoRope) k.rotate(c.rope, s.turns + t * c.turned, x, c.turned);
  if (c.norm == kAfterRope) k.rms_norm(x, weight, c.eps, x, size);
}

// Item: a token, one of its key heads, and one of the parts of what it sees.
void Layer::attend(int64_t item) const {
  const int64_t split = item % splits, head = item / splits % c.kv_heads;
  const int64_t t = item / splits / c.kv_heads;
  if (split >= splits_of(t)) return;
  const Place& at = place(t);
  const int64_t first = split * kSplit, row = c.head_size * kept_nbytes(at.type);
  const int64_t offset = head * at.head_stride + first * row;
  const Slots slots = {at.keys + offset,
                       at.values + offset,
                       scales(at.key_scales, at, head, first),
                       scales(at.value_scales, at, head, first),
                       at.type,
                       c.head_size,
                       std::min(kSplit, seen(t) - first)};
  float* out = partial + item * partial_size();
  float* most = out + group * padded;
  float* scores = reinterpret_cast<float*>(thread_scratch(group * kSplit * 4));
  k.attend(slots, queries + (t * c.heads + head * group) * padded, group, out, most, most + group,
           scores);
}

// Item: a token and one of its key heads.
void Layer::combine(int64_t item) const {
  const int64_t t = item / c.kv_heads, head = item % c.kv_heads, size = c.head_size;
  const float* parts = partial + item * splits * partial_size();
  for (int64_t h = 0; h < group; ++h) {
    const auto most = [&](int64_t i) { return parts[i * partial_size() + group * padded + h]; };
    const float* sink = c.sinks ? c.sinks + head * group + h : nullptr;
    float largest = most(0);
    for (int64_t i = 1; i < splits_of(t); ++i) largest = std::max(largest, most(i));
    float* out = attended + (t * c.heads + head * group + h) * size;
    std::fill(out, out + size, 0.0f);
    float total = sink ? std::exp(*sink - largest) : 0.0f;  // infinite: it takes all
    for (int64_t i = 0; i < splits_of(t); ++i) {
      const float* part = parts + i * partial_size();
      const float factor = std::exp(most(i) - largest);
      total += factor * part[group * padded + group + h];
      k.add_scaled(part + h * padded, factor, out, size);
    }
    for (int64_t i = 0; i < size; ++i) out[i] /= total;
  }
}

// Item: a token.
void Layer::normalize(int64_t t) const {
  const int64_t size = c.hidden_size;
  float* hidden = s.hidden + t * size;
  k.add_scaled(added + t * size, 1.0f, hidden, size);
  k.rms_norm(hidden, c.post_norm, c.eps, s.normed + t * size, size);
  if (guesses()) k.rms_norm(hidden, c.guess_norm, c.eps, guess_input + t * size, size);
}

void Layer::choose_experts(int64_t t) const {
  const Router& router = c.router;
  const int64_t row = c.index * s.tokens + t;
  if (router.weight.rows) {
    choose(router, logits + t * router.weight.rows, s.ids + row * router.top_k,
           s.weights + row * router.top_k);
  }
  if (guesses()) {
    const int64_t count = c.guess.weight.rows;
    guess(c.guess, guess_logits + t * count, s.guesses + row * c.guess.top_k);
  }
}

}  // namespace

void layer(const Kernels& kernels, const LayerCall& c, const StepCall& s, const float* delta,
           int threads) {
  Pool& pool = Pool::instance();
  const auto lock = pool.acquire();
  Layer l(kernels, c, s, delta);
  const int64_t T = s.tokens, q_size = c.heads * c.head_size, kv_size = c.kv_heads * c.head_size;
  FewProduct heads(kernels, T, nullptr, threads), out(kernels, T, nullptr, threads);
  FewProduct router(kernels, T, s.normed, threads), guess(kernels, T, nullptr, threads);
  heads.then = &out;
  heads.add(c.q, nullptr), heads.add(c.k, nullptr), heads.add(c.v, nullptr);
  out.add(c.o, nullptr);
  if (c.router.weight.rows) router.add(c.router.weight, nullptr);
  if (l.guesses()) guess.add(c.guess.weight, nullptr);

  Memory memory;
  FewProduct* const products[] = {&heads, &out, &router, &guess};
  const int64_t sizes[] = {T * c.hidden_size, T * q_size, T * kv_size, T * kv_size,
                           T * c.heads * l.padded, T * c.kv_heads * l.splits * l.partial_size(),
                           T * q_size, T * c.hidden_size, T * c.router.weight.rows,
                           l.guesses() ? T * c.hidden_size : 0, T * c.guess.weight.rows};
  float** const places[] = {&l.input,    &l.q,        &l.keys,  &l.values, &l.queries, &l.partial,
                            &l.attended, &l.added,    &l.logits, &l.guess_input, &l.guess_logits};
  constexpr int kPlaces = sizeof places / sizeof *places;
  static_assert(kPlaces == sizeof sizes / sizeof *sizes);
  int64_t at[kPlaces], codes_at[4];
  for (int i = 0; i < kPlaces; ++i) at[i] = memory.reserve(sizes[i] * 4);
  for (int i = 0; i < 4; ++i) codes_at[i] = memory.reserve(products[i]->codes_nbytes());
  memory.take(pool);
  for (int i = 0; i < kPlaces; ++i) *places[i] = memory.floats(at[i]);
  for (int i = 0; i < 4; ++i) products[i]->codes = memory.bytes(codes_at[i]);
  heads.x = l.input, heads.outs[0] = l.q, heads.outs[1] = l.keys, heads.outs[2] = l.values;
  out.x = l.attended, out.outs[0] = l.added;
  router.outs[0] = l.logits;
  guess.x = l.guess_input, guess.outs[0] = l.guess_logits;

  const int64_t router_codes = router.quantize_items(), router_rows = router.multiply_items();
  auto quantize_input = [&](int64_t i) { heads.quantize(i); };
  auto project = [&](int64_t i) { heads.multiply(i); };
  auto position = [&](int64_t i) { l.position(i); };
  auto attend = [&](int64_t i) { l.attend(i); };
  auto combine = [&](int64_t i) { l.combine(i); };
  auto whole_head = [&](int64_t i) { l.position(i), l.attend(i), l.combine(i); };
  auto quantize_heads = [&](int64_t i) { out.quantize(i); };
  auto project_out = [&](int64_t i) { out.multiply(i); };
  auto normalize = [&](int64_t i) { l.normalize(i); };
  auto quantize_routers = [&](int64_t i) {
    i < router_codes ? router.quantize(i) : guess.quantize(i - router_codes);
  };
  auto route = [&](int64_t i) {
    i < router_rows ? router.multiply(i) : guess.multiply(i - router_rows);
  };
  // Threads meet after every phase: what is little is done by this one, before and after.
  for (int64_t t = 0; t < T; ++t) l.begin(t);
  const int64_t alone = l.heads_by_themselves() ? c.kv_heads : 0;
  const int64_t shared = alone ? 0 : T * c.kv_heads;
  const Phase phases[] = {
      Phase::of(heads.quantize_items(), quantize_input),
      Phase::of(heads.multiply_items(), project),
      Phase::of(alone, whole_head),
      Phase::of(shared, position),
      Phase::of(shared * l.splits, attend),
      Phase::of(shared, combine),
      Phase::of(out.quantize_items(), quantize_heads),
      Phase::of(out.multiply_items(), project_out),
      Phase::of(T, normalize),
      Phase::of(router_codes + guess.quantize_items(), quantize_routers),
      Phase::of(router_rows + guess.multiply_items(), route),
  };
  pool.run(threads, phases, sizeof phases / sizeof *phases);
  for (int64_t t = 0; t < T; ++t) l.choose_experts(t);
}

void mlp(const Kernels& kernels, const MlpCall& call, const float* x, int64_t tokens, float* out,
         int threads) {
  Pool& pool = Pool::instance();
  const auto lock = pool.acquire();
  const int64_t size = call.gate.rows, item_rows = FewProduct::item_rows(size, threads);
  FewProduct inner(kernels, tokens, x, threads), outer(kernels, tokens, nullptr, threads);
  inner.add(call.gate, nullptr), inner.add(call.up, nullptr);
  outer.add(call.down, out);
  Memory memory;
  const int64_t codes_at = memory.reserve(inner.codes_nbytes());
  const int64_t outer_at = memory.reserve(outer.codes_nbytes());
  const int64_t values_at = memory.reserve(tokens * size * 4);
  memory.take(pool);
  inner.codes = memory.bytes(codes_at), outer.codes = memory.bytes(outer_at);
  float* values = memory.floats(values_at);
  outer.x = values;

  auto quantize = [&](int64_t i) { inner.quantize(i); };
  auto multiply = [&](int64_t i) {
    const int64_t row = i * item_rows, some = std::min(item_rows, size - row);
    float up[kMostTokens * FewProduct::kMostRows];
    const Matrix &gates = call.gate.matrix, &ups = call.up.matrix;
    const int64_t after = row + threads * item_rows;  // what this thread will probably take next
    const Next next = after < size ? Next::of(gates, after) : outer.read_by((after - size) / item_rows);
    inner.rows(call.gate, row, some, values + row, size, Next::of(ups, row));
    inner.rows(call.up, row, some, up, some, next);
    for (int64_t t = 0; t < tokens; ++t) {
      float* gate = values + t * size + row;
      kernels.activate(call.activation, gate, up + t * some, gate, some);
    }
  };
  auto quantize_values = [&](int64_t i) { outer.quantize(i); };
  auto multiply_down = [&](int64_t i) { outer.multiply(i); };
  const Phase phases[] = {
      Phase::of(inner.quantize_items(), quantize),
      Phase::of((size + item_rows - 1) / item_rows, multiply),
      Phase::of(outer.quantize_items(), quantize_values),
      Phase::of(outer.multiply_items(), multiply_down),
  };
  pool.run(threads, phases, 4);
}

}  // namespace moecli
