// Every CUDA launcher once or twice on small shapes, without torch: what compute-sanitizer looks at. Exits with 1 if CUDA
// reports an error or a result is not finite. Built by benchmarks/device/smoke_build.py; tests build it with the simulator.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/philox.h"
#include "cuda/norm_row_blocks.h"
#include "cuda/stage_parameter.h"
#include "cuda/sum_blocks.h"
#include "ops/flash_attention/flash_attention_gpu.h"
#include "ops/fused_add_rms_norm/fused_add_rms_norm.h"
#include "ops/gated_activations/gated_activations.h"
#include "ops/layer_norm/layer_norm.h"
#include "ops/merge_attention_states/merge_attention_states.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/rotary_embedding/rotary_embedding.h"

using namespace genai_kernels;

namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

const char* name_of(Dtype dtype) { return dtype == Dtype::f32 ? "f32" : dtype == Dtype::bf16 ? "bf16" : "f16"; }
int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Small multiples of 1/16, which every type holds exactly, in -2 .. 2.
uint32_t state = 1;
double next_number() {
  state = state * 1664525u + 1013904223u;
  return (int(state >> 26) - 32) / 16.0;
}
uint16_t bits_of(float x, Dtype dtype) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (dtype == Dtype::bf16) return uint16_t(u >> 16);
  if (x == 0) return 0;
  return uint16_t((u >> 31) << 15 | (((u >> 23) & 255) - 112) << 10 | ((u >> 13) & 1023));
}
double number_of(const char* at, Dtype dtype) {
  if (dtype == Dtype::f64) return *reinterpret_cast<const double*>(at);
  if (dtype == Dtype::f32) return *reinterpret_cast<const float*>(at);
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (dtype == Dtype::bf16) {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
  return (bits & 0x7c00) == 0x7c00 ? INFINITY : 0;  // all that is asked of it
}

// Memory of the card, given back at the end of a case.
class Memory {
 public:
  ~Memory() {
    for (void* p : all_) cudaFree(p);
  }
  char* raw(int64_t bytes) {
    void* p = nullptr;
    require(cudaMalloc(&p, size_t(bytes ? bytes : 1)), "cudaMalloc");
    all_.push_back(p);
    return static_cast<char*>(p);
  }
  char* input(int64_t n, Dtype dtype, double shift = 0) {
    std::vector<char> host(size_t(n * size_of(dtype)));
    for (int64_t i = 0; i < n; ++i) {
      const float x = float(next_number() + shift);
      if (dtype == Dtype::f32)
        std::memcpy(&host[size_t(4 * i)], &x, 4);
      else {
        const uint16_t b = bits_of(x, dtype);
        std::memcpy(&host[size_t(2 * i)], &b, 2);
      }
    }
    char* p = raw(int64_t(host.size()));
    require(cudaMemcpy(p, host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
  }
  char* ints(const std::vector<int32_t>& values) {
    char* p = raw(int64_t(4 * values.size()));
    require(cudaMemcpy(p, values.data(), 4 * values.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
  }
  char* output(const char* what, int64_t n, Dtype dtype) {
    outputs_.push_back({what, raw(n * size_of(dtype)), n, dtype});
    return outputs_.back().data;
  }
  char* zeros(const char* what, int64_t n, Dtype dtype) {
    char* p = output(what, n, dtype);
    const std::vector<char> host(size_t(n * size_of(dtype)));
    require(cudaMemcpy(p, host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
  }
  // Every element of every output is written, and finite.
  void check(const char* test, Dtype dtype) {
    require(cudaDeviceSynchronize(), test);
    for (const Output& o : outputs_) {
      std::vector<char> host(size_t(o.n * size_of(o.dtype)));
      require(cudaMemcpy(host.data(), o.data, host.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
      for (int64_t i = 0; i < o.n; ++i)
        if (!std::isfinite(number_of(&host[size_t(i * size_of(o.dtype))], o.dtype))) {
          std::printf("%s %s: %s[%lld] is not finite\n", test, name_of(dtype), o.what, static_cast<long long>(i));
          std::exit(1);
        }
    }
    std::printf("%s %s: ok\n", test, name_of(dtype));
  }

 private:
  struct Output {
    const char* what;
    char* data;
    int64_t n;
    Dtype dtype;
  };
  std::vector<void*> all_;
  std::vector<Output> outputs_;
};

Rows rows(char* data, int64_t count, int64_t length) {
  Rows r;
  r.data = data;
  r.length = length;
  r.append(count, length);
  return r;
}

using NormForward = cudaError_t (*)(const NormParams&, cudaStream_t);
using NormBackward = cudaError_t (*)(const NormParams&, const RowBlocks&, cudaStream_t);

void norms(const char* test, Dtype dtype, int64_t count, int64_t n, bool residual, bool bias, NormForward forward,
           NormBackward backward) {
  Memory m;
  NormParams p{};
  p.dtype = dtype;
  p.eps = 1e-5;
  const auto parameter = [&] {
    const Parameter given{m.input(n, dtype), 1, dtype};
    char* staged = m.output("parameter", staged_length(n), Dtype::f32);
    require(launch_stage_parameter(given, n, reinterpret_cast<float*>(staged), nullptr), "stage_parameter");
    return Parameter{staged, 1, Dtype::f32};
  };
  p.weight = parameter();
  if (bias) p.bias = parameter();
  p.x = rows(m.input(count * n, dtype), count, n);
  p.y = rows(m.output("y", count * n, dtype), count, n);
  if (residual) {
    p.residual = rows(m.input(count * n, dtype), count, n);
    p.sum = rows(m.output("sum", count * n, dtype), count, n);
  }
  require(forward(p, nullptr), test);
  p.residual = p.sum = {};
  const RowBlocks blocks = gpu_norm_blocks(count, n, dtype);
  p.dy = rows(m.input(count * n, dtype), count, n);
  p.dx = rows(m.output("dx", count * n, dtype), count, n);
  if (residual) p.dsum = rows(m.input(count * n, dtype), count, n);
  const Dtype sums = dtype == Dtype::f32 ? Dtype::f64 : Dtype::f32;
  p.dw_partial = m.output("dw_partial", blocks.count() * n, sums);
  if (bias) p.db_partial = m.output("db_partial", blocks.count() * n, sums);
  require(backward(p, blocks, nullptr), test);
  char* dw = m.output("dw", n, dtype);
  require(launch_sum_blocks(sums == Dtype::f64, p.dw_partial, blocks.count(), n, dtype, dw, nullptr), test);
  m.check(test, dtype);
}

void gates(Dtype dtype, Gate gate) {
  constexpr int64_t kCount = 5, n = 104;
  Memory m;
  GatedActivationParams p{};
  p.dtype = dtype;
  p.gate = gate;
  p.x = rows(m.input(kCount * 2 * n, dtype), kCount, 2 * n);
  p.y = rows(m.output("y", kCount * n, dtype), kCount, n);
  require(launch_gated_activation_fwd(p, nullptr), "gated_activation_fwd");
  p.dy = rows(m.input(kCount * n, dtype), kCount, n);
  p.dx = rows(m.output("dx", kCount * 2 * n, dtype), kCount, 2 * n);
  require(launch_gated_activation_bwd(p, nullptr), "gated_activation_bwd");
  m.check("gated_activations", dtype);
}

void rotary(Dtype dtype, bool interleaved) {
  constexpr int64_t kTokens = 7, kHeads = 3, kDim = 48, kRotary = 32;
  Memory m;
  RotaryParams p{};
  p.dtype = dtype;
  p.table_dtype = Dtype::f32;
  p.interleaved = interleaved;
  p.heads = kHeads;
  p.head_dim = kDim;
  p.rotary_dim = kRotary;
  p.x = p.y = rows(nullptr, kTokens, kHeads * kDim);
  p.x.length = p.y.length = 1;
  p.x.data = m.input(kTokens * kHeads * kDim, dtype);
  p.y.data = m.output("y", kTokens * kHeads * kDim, dtype);
  p.x_head_stride = p.y_head_stride = kDim;
  p.cos = rows(m.input(kTokens * kRotary / 2, Dtype::f32), kTokens, kRotary / 2);
  p.sin = rows(m.input(kTokens * kRotary / 2, Dtype::f32), kTokens, kRotary / 2);
  require(launch_rotary_fwd(p, nullptr), "rotary_fwd");
  m.check("rotary_embedding", dtype);
}

void merge(Dtype dtype) {
  constexpr int64_t kTokens = 6, kHeads = 3, kDim = 40, kRows = kTokens * kHeads;
  Memory m;
  MergeAttentionStatesParams p{};
  p.dtype = dtype;
  p.tokens = kTokens;
  p.heads = kHeads;
  const auto in = [&] { return rows(m.input(kRows * kDim, dtype), kRows, kDim); };
  const auto out = [&](const char* what) { return rows(m.output(what, kRows * kDim, dtype), kRows, kDim); };
  const auto lse_in = [&] { return PerRow{m.input(kRows, Dtype::f32), 0, kTokens, 1}; };
  const auto lse_out = [&](const char* what) { return PerRow{m.output(what, kRows, Dtype::f32), 0, kTokens, 1}; };
  p.o_a = in();
  p.o_b = in();
  p.o = out("o");
  p.lse_a = lse_in();
  p.lse_b = lse_in();
  p.lse = lse_out("lse");
  require(launch_merge_attention_states_fwd(p, nullptr), "merge_attention_states_fwd");
  p.d_o = in();
  p.d_o_a = out("d_o_a");
  p.d_o_b = out("d_o_b");
  p.dlse = lse_in();
  p.dlse_a = lse_out("dlse_a");
  p.dlse_b = lse_out("dlse_b");
  require(launch_merge_attention_states_bwd(p, nullptr), "merge_attention_states_bwd");
  m.check("merge_attention_states", dtype);
}

struct AttentionKernels {
  const char* name;
  cudaError_t (*forward)(const FlashAttentionParams&, cudaStream_t);
  cudaError_t (*backward)(const FlashAttentionParams&, cudaStream_t);
};

void attention(const AttentionKernels& kernels, Dtype dtype, int64_t head_dim, bool packed, bool extras) {
  Memory m;
  FlashAttentionParams p{};
  p.dtype = dtype;
  p.batch = 2;
  p.heads = 4;
  p.kv_heads = p.group = 2;
  p.head_dim = p.value_dim = head_dim;
  const int64_t queries = 150, keys = 203;  // of a sequence; packed: of both together
  p.queries = queries;
  p.keys = keys;
  if (packed) {
    p.cu_q = reinterpret_cast<const int32_t*>(m.ints({0, 37, int32_t(queries)}));
    p.cu_k = reinterpret_cast<const int32_t*>(m.ints({0, 120, int32_t(keys)}));
  }
  const int64_t sequences = packed ? 1 : p.batch;
  p.total_queries = sequences * queries;
  p.total_keys = sequences * keys;
  const auto view = [&](char* data, int64_t tokens, int64_t heads) {
    const int64_t token = heads * head_dim;
    return HeadsView{data, dtype, packed ? 0 : tokens * token, token, head_dim, 1};
  };
  const int64_t size_q = p.total_queries * p.heads * head_dim, size_k = p.total_keys * p.kv_heads * head_dim;
  const int64_t rows_of_lse = p.total_queries * p.heads;
  p.q = view(m.input(size_q, dtype), queries, p.heads);
  p.k = view(m.input(size_k, dtype), keys, p.kv_heads);
  p.v = view(m.input(size_k, dtype), keys, p.kv_heads);
  p.out = view(m.output("out", size_q, dtype), queries, p.heads);
  p.lse = m.output("lse", rows_of_lse, Dtype::f32);
  p.softmax_state = m.output("softmax_state", 2 * rows_of_lse, Dtype::f32);
  p.lse_batch = packed ? 0 : p.heads * queries;
  p.lse_head = queries;
  p.scale = 0.125;
  p.left = extras ? 90 : -1;
  p.right = 60;  // every query sees a key
  p.pairs_together = 1;
  p.dropout_p = extras ? 0.25 : 0;
  p.dropout_threshold = dropout_threshold(p.dropout_p);
  p.dropout_factor = float(1 / (1 - p.dropout_p));
  p.seed = 42;
  if (extras) {
    p.softcap = 5;
    p.slopes = m.input(p.heads, Dtype::f32);
    p.sink = m.input(p.heads, Dtype::f32);
    p.bias = {m.input(queries * keys, dtype), dtype, 0, 0, keys, 1};
  }
  require(kernels.forward(p, nullptr), kernels.name);
  p.dout = view(m.input(size_q, dtype), queries, p.heads);
  p.dq = view(m.output("dq", size_q, dtype), queries, p.heads);
  p.dk = view(m.output("dk", size_k, dtype), keys, p.kv_heads);
  p.dv = view(m.output("dv", size_k, dtype), keys, p.kv_heads);
  p.delta = m.output("delta", rows_of_lse, Dtype::f32);
  if (extras) p.dsink = m.output("dsink", p.batch * p.heads, Dtype::f32);
  require(launch_flash_attention_delta(p, nullptr), "flash_attention_delta");
  require(kernels.backward(p, nullptr), kernels.name);
  if (extras) {
    p.dbias = {m.zeros("dbias", queries * keys, Dtype::f64), Dtype::f64, 0, 0, keys, 1};
    require(launch_flash_attention_dbias(p, nullptr), "flash_attention_dbias");
  }
  m.check(kernels.name, dtype);
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    for (const int64_t n : {100, 4096}) {
      norms("rms_norm", dtype, 9, n, false, false, launch_rms_norm_fwd, launch_rms_norm_bwd);
      norms("fused_add_rms_norm", dtype, 9, n, true, false, launch_fused_add_rms_norm_fwd,
            launch_fused_add_rms_norm_bwd);
      norms("layer_norm", dtype, 9, n, false, true, launch_layer_norm_fwd, launch_layer_norm_bwd);
    }
    for (const Gate gate : {Gate::silu, Gate::gelu, Gate::gelu_tanh}) gates(dtype, gate);
    for (const bool interleaved : {false, true}) rotary(dtype, interleaved);
    merge(dtype);
    const AttentionKernels simt{"simt", launch_flash_attention_fwd_simt, launch_flash_attention_bwd_simt};
    attention(simt, dtype, 40, false, true);
    attention(simt, dtype, 40, true, false);
    if (dtype == Dtype::f32) continue;
    const AttentionKernels sm80{"sm80", launch_flash_attention_fwd_sm80, launch_flash_attention_bwd_sm80};
    for (const int64_t dim : {64, 128})
      for (const bool packed : {false, true})
        for (const bool extras : {false, true}) attention(sm80, dtype, dim, packed, extras);
    int major = 0;
    require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
    if (major != 9) continue;
    const AttentionKernels sm90{"sm90", launch_flash_attention_fwd_sm90, launch_flash_attention_bwd_sm90};
    for (const int64_t dim : {64, 128})
      for (const bool packed : {false, true})
        for (const bool extras : {false, true}) attention(sm90, dtype, dim, packed, extras);
  }
  std::puts("smoke: ok");
  return 0;
}
