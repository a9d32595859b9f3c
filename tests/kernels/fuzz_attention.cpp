// Random calls of the attention kernels, torch-free, every buffer of exactly its size on the heap, compared with a plain
// loop in double. Built by tests/test_fuzz.py under -fsanitize=address,undefined, which reports any byte read or written
// beyond a buffer.
//
// Usage: fuzz_attention SEED CASES: case i follows from SEED + i alone, so `fuzz_attention SEED+i 1` replays it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "ops/flash_attention/flash_attention_cpu.cpp"

namespace genai_kernels {
namespace {

using Random = std::mt19937_64;

int64_t pick(Random& random, int64_t low, int64_t high) { return low + int64_t(random() % uint64_t(high - low + 1)); }

// [batch, tokens, heads, dim] floats with random strides: dimensions in any order, with gaps, memory of exactly the span.
struct Heads {
  int64_t batch, tokens, heads, dim;
  HeadsView view;
  std::unique_ptr<float[]> memory;
  int64_t span = 1;

  // An output's dim has stride 1: what the host allocates.
  Heads(Random& random, int64_t b, int64_t t, int64_t h, int64_t d, bool output = false)
      : batch(b), tokens(t), heads(h), dim(d) {
    int order[4] = {0, 1, 2, 3};
    for (int i = 3; i > 0; --i) std::swap(order[i], order[pick(random, 0, i)]);
    if (random() % 2 || output)  // usual: dim innermost
      for (int& o : order)
        if (o == 3) std::swap(o, order[3]);
    const int64_t sizes[4] = {b, t, h, d};
    int64_t strides[4], step = random() % 4 || output ? 1 : 2;
    for (int i = 3; i >= 0; --i) {
      strides[order[i]] = step;
      step *= sizes[order[i]] > 0 ? sizes[order[i]] : 1;
      if (random() % 4 == 0) step += pick(random, 1, 3);
    }
    for (int i = 0; i < 4; ++i) span += sizes[i] > 0 ? (sizes[i] - 1) * strides[i] : 0;
    memory.reset(new float[span]);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < span; ++i) memory[i] = normal(random);
    view.data = reinterpret_cast<char*>(memory.get());
    view.batch = strides[0];
    view.token = strides[1];
    view.head = strides[2];
    view.dim = strides[3];
  }
  float& at(int64_t b, int64_t t, int64_t h, int64_t d) {
    return memory[b * view.batch + t * view.token + h * view.head + d * view.dim];
  }
};

struct Call {
  FlashAttentionParams p{};
  std::unique_ptr<Heads> q, k, v, out;
  std::unique_ptr<float[]> lse, state, slopes, sink, bias;
  std::unique_ptr<char[]> mask;

  explicit Call(Random& random) {
    p.dtype = Dtype::f32;
    p.batch = pick(random, 1, 2);
    p.kv_heads = pick(random, 1, 2);
    p.group = pick(random, 1, 3);
    p.heads = p.kv_heads * p.group;
    p.head_dim = pick(random, 1, 70);
    p.value_dim = random() % 3 ? p.head_dim : pick(random, 1, 70);
    p.queries = pick(random, 0, random() % 4 ? 40 : 150);
    p.keys = pick(random, 0, random() % 4 ? 40 : 300);
    q = std::make_unique<Heads>(random, p.batch, p.queries, p.heads, p.head_dim);
    k = std::make_unique<Heads>(random, p.batch, p.keys, p.kv_heads, p.head_dim);
    v = std::make_unique<Heads>(random, p.batch, p.keys, p.kv_heads, p.value_dim);
    out = std::make_unique<Heads>(random, p.batch, p.queries, p.heads, p.value_dim, true);
    p.q = q->view;
    p.k = k->view;
    p.v = v->view;
    p.out = out->view;
    p.lse_batch = p.heads * p.queries;
    p.lse_head = p.queries;
    const int64_t rows = p.batch * p.heads * p.queries;
    lse.reset(new float[rows]);
    state.reset(new float[2 * rows]);
    p.lse = reinterpret_cast<char*>(lse.get());
    p.softmax_state = reinterpret_cast<char*>(state.get());
    p.left = random() % 2 ? -1 : pick(random, 0, 60);
    p.right = random() % 2 ? -1 : pick(random, 0, 60);
    p.scale = random() % 8 ? 1 / std::sqrt(double(p.head_dim)) : -0.2;
    p.softcap = random() % 4 ? 0 : 3;
    std::normal_distribution<float> normal;
    const auto numbers = [&](int64_t n) {
      std::unique_ptr<float[]> made(new float[n]);
      for (int64_t i = 0; i < n; ++i) made[i] = normal(random);
      return made;
    };
    if (random() % 4 == 0) slopes = numbers(p.heads), p.slopes = reinterpret_cast<char*>(slopes.get());
    if (random() % 4 == 0) sink = numbers(p.heads), p.sink = reinterpret_cast<char*>(sink.get());
    // [batch, heads, queries, keys], broadcast in random dimensions
    const auto broadcast_over = [&](ScoresView& view) {
      int64_t n = 1;
      const int64_t sizes[4] = {p.keys, p.queries, p.heads, p.batch};
      int64_t* const strides[4] = {&view.key, &view.query, &view.head, &view.batch};
      for (int i = 0; i < 4; ++i)
        if (random() % 3) *strides[i] = n, n *= sizes[i];
      return n;
    };
    if (random() % 4 == 0) bias = numbers(broadcast_over(p.bias)), p.bias.data = reinterpret_cast<char*>(bias.get());
    if (random() % 4 == 0) {
      const int64_t n = broadcast_over(p.mask);
      mask.reset(new char[n]);
      for (int64_t i = 0; i < n; ++i) mask[i] = random() % 4 != 0;
      p.mask.data = mask.get();
    }
    p.block_rows = kRowsMultiple * pick(random, 1, 3);
  }
};

// -inf where hidden.
double score(Call& c, int64_t b, int64_t i, int64_t h, int64_t j) {
  const FlashAttentionParams& p = c.p;
  const int64_t diagonal = i + p.keys - p.queries;
  if ((p.left >= 0 && j < diagonal - p.left) || (p.right >= 0 && j > diagonal + p.right)) return -INFINITY;
  const auto index = [&](const ScoresView& v) { return b * v.batch + h * v.head + i * v.query + j * v.key; };
  if (c.mask && !c.mask[index(p.mask)]) return -INFINITY;
  double s = 0;
  for (int64_t d = 0; d < p.head_dim; ++d) s += double(c.q->at(b, i, h, d)) * c.k->at(b, j, h / p.group, d);
  s *= p.scale;
  if (p.softcap > 0) s = p.softcap * std::tanh(s / p.softcap);
  if (c.slopes) s -= c.slopes[h] * std::abs(double(diagonal - j));
  if (c.bias) s += c.bias[index(p.bias)];
  return s;
}

// The largest error in units of what float32 may cost here; infinity where one is not a number.
double worst_error(Call& c) {
  const FlashAttentionParams& p = c.p;
  double worst = 0;
  std::vector<double> scores(p.keys);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t i = 0; i < p.queries; ++i) {
        double top = c.sink ? c.sink[h] : -INFINITY, size = 1;
        for (int64_t j = 0; j < p.keys; ++j) {
          scores[j] = score(c, b, i, h, j);
          top = std::max(top, scores[j]);
          if (std::isfinite(scores[j])) size = std::max(size, std::abs(scores[j]));
        }
        double sum = c.sink ? std::exp(c.sink[h] - top) : 0;
        for (double& s : scores) sum += s = s == -INFINITY ? 0 : std::exp(s - top);
        const double lse = sum == 0 ? -INFINITY : top + std::log(sum), ours = c.lse[(b * p.heads + h) * p.queries + i];
        if (sum == 0 ? ours != -INFINITY : !(std::abs(ours - lse) <= 1e-5 * (size + std::abs(lse)))) return INFINITY;
        for (int64_t d = 0; d < p.value_dim; ++d) {
          double value = 0, magnitude = 0;
          for (int64_t j = 0; j < p.keys; ++j) {
            value += scores[j] * c.v->at(b, j, h / p.group, d);
            magnitude += scores[j] * std::abs(c.v->at(b, j, h / p.group, d));
          }
          if (sum > 0) value /= sum, magnitude /= sum;
          const double error = std::abs(double(c.out->at(b, i, h, d)) - value);
          if (!(error <= 1e-5 * size * magnitude + 1e-30)) return INFINITY;
          if (magnitude > 0) worst = std::max(worst, error / (0x1p-24 * size * magnitude));
        }
      }
  return worst;
}

}  // namespace
}  // namespace genai_kernels

int main(int argc, char** argv) {
  using namespace genai_kernels;
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int64_t cases = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 100;
  double worst = 0;
  for (int64_t i = 0; i < cases; ++i) {
    Random random(seed + i);
    Call call(random);
    std::printf("\rseed %llu", static_cast<unsigned long long>(seed + i));
    std::fflush(stdout);
    const int64_t bytes = flash_attention_fwd_scratch(call.p);
    for (int64_t b = 0; b < call.p.batch; ++b)
      for (int64_t h = 0; h < call.p.kv_heads; ++h)
        for (int64_t row = 0; row < call.p.queries * call.p.group; row += call.p.block_rows) {
          void* scratch = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
          std::memset(scratch, 0xff, (bytes + 127) / 128 * 128);  // NaN: nothing may be taken for zero
          flash_attention_fwd_kernel(call.p, b, h, row, scratch);
          std::free(scratch);
        }
    const double error = worst_error(call);
    if (!(error < 1e9)) {
      std::printf(": wrong: batch %ld heads %ld/%ld queries %ld keys %ld dims %ld %ld window %ld %ld\n", call.p.batch,
                  call.p.heads, call.p.kv_heads, call.p.queries, call.p.keys, call.p.head_dim, call.p.value_dim,
                  call.p.left, call.p.right);
      return 1;
    }
    worst = std::max(worst, error);
  }
  std::printf("\r%ld cases from seed %llu: worst error %.1f units of roundoff\n", cases,
              static_cast<unsigned long long>(seed), worst);
  return 0;
}
