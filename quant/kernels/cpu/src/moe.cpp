// Knows the routed experts of one layer as phases of items; see moe.h.
#include "moe.h"

#include <algorithm>
#include <vector>

#include "few.h"
#include "pool.h"

namespace moecli {
namespace {

constexpr int64_t kGroup = 32;       // elements of an activation's scale
constexpr int64_t kInnerRows = 128;  // most intermediate rows of an item

int64_t aligned(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

// One expert that was chosen: which choices, and where its activations lie in the workspace.
struct Chosen {
  const uint8_t* blob;
  const float* bias;  // of gate, up and down, or null
  int first, count;  // of `order`
  bool few;
  int64_t input;  // offset; few: of a list of tokens, else of its blocks
  int64_t inner;
};

struct Layer {
  const Kernels& k;
  const MoeCall& c;
  int64_t inner_size;          // intermediate rows that contribute
  std::vector<int> order;      // choices t * k + j, by expert
  std::vector<Chosen> chosen;  // ascending
  bool any_few = false, any_many = false;
  int64_t rows_stride, plain_stride, inner_stride;
  int64_t rows_at = 0, plain_at = 0, nbytes = 0;
  uint8_t* memory = nullptr;
  int threads;
  int64_t inner_rows = 0;  // of an item of the phase of intermediate rows: whole groups
  int64_t out_rows = 0;    // of an item of the last phase

  Layer(const Kernels& kernels, const MoeCall& call, int threads);

  int token(int choice) const { return static_cast<int>(choice / c.choices); }
  float input_factor(int choice) const { return c.weight_on_input ? c.weights[choice] : 1.0f; }
  Matrix matrix(const uint8_t* blob, int which) const;
  int64_t inner_parts() const { return (inner_size + inner_rows - 1) / inner_rows; }
  Next at(const Chosen& e, int which, int64_t row) const {
    return Next::of(matrix(e.blob, which), row);
  }
  uint8_t* rows_of(int choice) const {
    const int64_t which = c.weight_on_input ? choice : token(choice);
    return memory + rows_at + which * rows_stride;
  }

  void quantize(int64_t item) const;
  void interleave(int64_t item) const;
  void inner(int64_t item) const;
  void inner_few(const Chosen& e, int64_t row, int64_t rows, const Next& next) const;
  void inner_many(const Chosen& e, int64_t row, int64_t rows, const Next& next) const;
  void outer(int64_t item) const;
  void bias(const Chosen& e, int which, int64_t row, int64_t rows, float* y) const;
  void add(const Chosen& e, int64_t row, int64_t rows, const float* y, float* sums) const;
};

Layer::Layer(const Kernels& kernels, const MoeCall& call, int threads)
    : k(kernels), c(call), inner_size(call.end - call.begin), threads(threads) {
  std::vector<int> start(static_cast<size_t>(c.experts) + 1, 0);
  const int64_t all = c.tokens * c.choices;
  for (int64_t i = 0; i < all; ++i) ++start[static_cast<size_t>(c.ids[i]) + 1];
  for (int64_t e = 0; e < c.experts; ++e) start[e + 1] += start[e];
  order.resize(static_cast<size_t>(all));
  std::vector<int> next(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < all; ++i) order[next[c.ids[i]]++] = static_cast<int>(i);

  rows_stride = aligned(k.rows_nbytes(c.hidden_size, c.bits));
  plain_stride = aligned(k.plain_nbytes(c.hidden_size));
  inner_stride = aligned(k.rows_nbytes(inner_size, c.bits));
  const auto reserve = [&](int64_t size) {
    const int64_t at = nbytes;
    nbytes += aligned(size);
    return at;
  };
  for (int64_t e = 0; e < c.experts; ++e) {
    const int count = start[e + 1] - start[e];
    if (!count || !c.addresses[e]) continue;
    const float* bias = c.biases ? c.biases + e * (2 * c.intermediate + c.hidden_size) : nullptr;
    Chosen one = {reinterpret_cast<const uint8_t*>(c.addresses[e]), bias, start[e], count,
                  is_few(count), 0, 0};
    if (one.few) {
      any_few = true;
      one.inner = reserve(count * inner_stride);
    } else {
      any_many = true;
      one.input = reserve(blocks_nbytes(k, c.hidden_size, count));
      one.inner = reserve(blocks_nbytes(k, inner_size, count));
    }
    chosen.push_back(one);
  }
  if (any_few) rows_at = reserve((c.weight_on_input ? all : c.tokens) * rows_stride);
  if (any_many) plain_at = reserve(c.tokens * plain_stride);
  // Items enough for all threads. But each is a stream of memory that has to begin, and reads the
  // activations of its experts once.
  const auto part = [](int64_t all, int64_t parts, int64_t most) {
    const int64_t rows = (all + parts - 1) / parts;
    return std::min(most, (rows + kGroup - 1) / kGroup * kGroup);
  };
  const int64_t parts = 8 * threads, count = std::max<int64_t>(1, chosen.size());
  inner_rows = part(inner_size, (parts + count - 1) / count, any_many ? 64 : kInnerRows);
  out_rows = part(c.hidden_size, parts, any_many ? 256 : 128);
}

Matrix Layer::matrix(const uint8_t* blob, int which) const {
  const int64_t rows = c.intermediate * c.hidden_size * c.bits / 8;
  const int64_t scales = c.intermediate * c.hidden_size / c.group * 2;
  const uint8_t* packed = blob + which * (rows + scales);
  const int64_t in = which == 2 ? c.intermediate : c.hidden_size;
  Matrix m = {packed, packed + rows, in * c.bits / 8, in / c.group * 2, in, c.bits, c.group};
  if (which == 2) {
    m.packed += c.begin * c.bits / 8;
    m.scale += c.begin / c.group * 2;
    m.in = inner_size;
  } else {
    m.packed += c.begin * m.packed_stride;
    m.scale += c.begin * m.scale_stride;
  }
  return m;
}

// Item: a token.
void Layer::quantize(int64_t t) const {
  const float* x = c.hidden + t * c.hidden_size;
  if (any_many) {
    k.plain_quantize(x, 0, c.hidden_size, c.bits, memory + plain_at + t * plain_stride,
                     c.hidden_size);
  }
  if (!any_few) return;
  const int64_t first = t * c.choices, count = c.weight_on_input ? c.choices : 1;
  for (int64_t choice = first; choice < first + count; ++choice) {
    uint8_t* out = rows_of(static_cast<int>(choice));
    k.rows_quantize(x, input_factor(static_cast<int>(choice)), 0, c.hidden_size, c.bits, out);
    k.rows_pad(c.hidden_size, c.bits, out);
  }
}

// Item: an expert.
void Layer::interleave(int64_t item) const {
  const Chosen& e = chosen[item];
  if (e.few) {
    for (int i = 0; i < e.count; ++i) {
      k.rows_pad(inner_size, c.bits, memory + e.inner + i * inner_stride);
    }
    return;
  }
  const Blocks blocks(e.count, k.block);
  uint8_t* to = memory + e.input;
  for (int b = 0; b < blocks.count; ++b) {
    const int size = blocks.size(b);
    for (int slot = 0; slot < size; ++slot) {
      const int choice = order[e.first + blocks.first(b) + slot];
      k.block_insert(memory + plain_at + token(choice) * plain_stride, c.hidden_size, 0,
                     c.hidden_size / 32, input_factor(choice), slot, size, to);
    }
    to += k.block_nbytes(c.hidden_size, size);
  }
}

// Item: an expert and some of its intermediate rows.
void Layer::inner(int64_t item) const {
  const int64_t parts = inner_parts(), after = item + threads;
  const Chosen& e = chosen[item / parts];
  const int64_t row = item % parts * inner_rows, rows = std::min(inner_rows, inner_size - row);
  Next next;
  if (after < parts * static_cast<int64_t>(chosen.size())) {
    next = at(chosen[after / parts], 0, after % parts * inner_rows);
  }
  if (e.few) {
    inner_few(e, row, rows, next);
  } else {
    inner_many(e, row, rows, next);
  }
}

void Layer::inner_few(const Chosen& e, int64_t row, int64_t rows, const Next& next) const {
  float gate[kFew * kInnerRows], up[kFew * kInnerRows];
  const uint8_t* x[kFew];
  for (int i = 0; i < e.count; ++i) x[i] = rows_of(order[e.first + i]);
  k.rows_matmul(matrix(e.blob, 0), row, rows, x, e.count, gate, rows, at(e, 1, row));
  k.rows_matmul(matrix(e.blob, 1), row, rows, x, e.count, up, rows, next);
  bias(e, 0, row, rows, gate);
  bias(e, 1, row, rows, up);
  k.activate(c.activation, gate, up, gate, e.count * rows);
  for (int i = 0; i < e.count; ++i) {
    k.rows_quantize(gate + i * rows, 1.0f, row, rows, c.bits,
                    memory + e.inner + i * inner_stride);
  }
}

void Layer::inner_many(const Chosen& e, int64_t row, int64_t rows, const Next& next) const {
  const int64_t scratch_size = aligned(k.tiles_scratch(c.hidden_size, c.bits));
  const int64_t values = e.count * rows, plain_size = aligned(k.plain_nbytes(rows));
  uint8_t* scratch = thread_scratch(scratch_size + plain_size + 2 * values * 4);
  uint8_t* plain = scratch + scratch_size;
  float* gate = reinterpret_cast<float*>(plain + plain_size);
  float* up = gate + values;
  const uint8_t* x = memory + e.input;
  const Matrix gates = matrix(e.blob, 0), ups = matrix(e.blob, 1);
  k.tiles_matmul(gates, row, rows, x, e.count, gate, rows, scratch, at(e, 1, row));
  k.tiles_matmul(ups, row, rows, x, e.count, up, rows, scratch, next);
  bias(e, 0, row, rows, gate);
  bias(e, 1, row, rows, up);
  k.activate(c.activation, gate, up, gate, values);
  const Blocks blocks(e.count, k.block);
  uint8_t* to = memory + e.inner;
  for (int b = 0; b < blocks.count; ++b) {
    const int size = blocks.size(b);
    for (int slot = 0; slot < size; ++slot) {
      k.plain_quantize(gate + (blocks.first(b) + slot) * rows, 0, rows, c.bits, plain, rows);
      k.block_insert(plain, rows, 0, rows / kGroup, 1.0f, slot, size,
                     to + k.block_nbytes(row, size));
    }
    to += k.block_nbytes(inner_size, size);
  }
}

// Item: some rows of the output, of all experts.
void Layer::outer(int64_t item) const {
  const int64_t row = item * out_rows, rows = std::min(out_rows, c.hidden_size - row);
  int most = 0;
  for (const Chosen& e : chosen) most = std::max(most, e.count);
  const int64_t tiles = any_many ? aligned(k.tiles_scratch(inner_size, c.bits)) : 0;
  const int64_t sums_size = c.sums ? aligned(c.tokens * rows * 4) : 0;
  uint8_t* scratch = thread_scratch(tiles + sums_size + aligned(most * rows * 4));
  float* sums = c.sums ? reinterpret_cast<float*>(scratch + tiles) : nullptr;
  float* y = reinterpret_cast<float*>(scratch + tiles + sums_size);
  if (sums) std::fill(sums, sums + c.tokens * rows, 0.0f);
  for (size_t which = 0; which < chosen.size(); ++which) {
    const Chosen& e = chosen[which];
    const Matrix down = matrix(e.blob, 2);
    Next next;
    if (which + 1 < chosen.size()) {
      next = at(chosen[which + 1], 2, row);
    } else if (row + threads * out_rows < c.hidden_size) {
      next = at(chosen[0], 2, row + threads * out_rows);
    }
    if (e.few) {
      const uint8_t* x[kFew];
      for (int i = 0; i < e.count; ++i) x[i] = memory + e.inner + i * inner_stride;
      k.rows_matmul(down, row, rows, x, e.count, y, rows, next);
    } else {
      k.tiles_matmul(down, row, rows, memory + e.inner, e.count, y, rows, scratch, next);
    }
    if (c.begin == 0) bias(e, 2, row, rows, y);  // once, where parts of an expert add up
    add(e, row, rows, y, sums);
  }
  for (int64_t t = 0; sums && t < c.tokens; ++t) {
    k.add_scaled(sums + t * rows, 1.0f, c.sums + t * c.hidden_size + row, rows);
  }
}

// y [count, rows] += what of a projection's bias belongs to these rows.
void Layer::bias(const Chosen& e, int which, int64_t row, int64_t rows, float* y) const {
  if (!e.bias) return;
  const float* from = e.bias + which * c.intermediate + row + (which < 2 ? c.begin : 0);
  for (int i = 0; i < e.count; ++i) k.add_scaled(from, 1.0f, y + i * rows, rows);
}

void Layer::add(const Chosen& e, int64_t row, int64_t rows, const float* y, float* sums) const {
  for (int i = 0; i < e.count; ++i, y += rows) {
    const int choice = order[e.first + i];
    const float factor = c.weight_on_input ? 1.0f : c.weights[choice];
    if (sums) {
      k.add_scaled(y, factor, sums + token(choice) * rows, rows);
    } else {
      k.store_scaled(y, factor, c.contributions + choice * c.hidden_size + row, rows);
    }
  }
}

}  // namespace

void routed_experts(const Kernels& kernels, const MoeCall& call, int threads) {
  Pool& pool = Pool::instance();
  const auto lock = pool.acquire();
  Layer layer(kernels, call, threads);
  if (layer.chosen.empty()) return;
  layer.memory = pool.workspace(layer.nbytes);
  const int64_t experts = static_cast<int64_t>(layer.chosen.size());
  auto quantize = [&](int64_t item) { layer.quantize(item); };
  auto interleave = [&](int64_t item) { layer.interleave(item); };
  auto inner = [&](int64_t item) { layer.inner(item); };
  auto outer = [&](int64_t item) { layer.outer(item); };
  const Phase phases[] = {
      Phase::of(call.tokens, quantize),
      Phase::of(experts, interleave),
      Phase::of(experts * layer.inner_parts(), inner),
      Phase::of((call.hidden_size + layer.out_rows - 1) / layer.out_rows, outer),
  };
  pool.run(threads, phases, 4);
}

void sum_contributions(const Kernels& kernels, const float* contributions, const int64_t* ids,
                       int64_t tokens, int64_t choices, int64_t hidden_size, float* out,
                       int threads) {
  Pool& pool = Pool::instance();
  const auto lock = pool.acquire();
  auto sum = [&](int64_t t) {
    std::vector<int64_t> order(static_cast<size_t>(choices));
    for (int64_t j = 0; j < choices; ++j) order[j] = j;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return ids[t * choices + a] < ids[t * choices + b];
    });
    std::vector<float> total(static_cast<size_t>(hidden_size), 0.0f);
    for (const int64_t j : order) {
      kernels.add_scaled(contributions + (t * choices + j) * hidden_size, 1.0f, total.data(),
                         hidden_size);
    }
    kernels.add_scaled(total.data(), 1.0f, out + t * hidden_size, hidden_size);
  };
  const Phase phase = Phase::of(tokens, sum);
  pool.run(threads, &phase, 1);
}

}  // namespace moecli
