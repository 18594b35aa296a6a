// The inner loops of the CPU ops, compiled once per instruction set from kernels_body.h and chosen when the process starts.
// The reduction order of an output depends on its shape and the instruction set only: never on the other rows, on how many
// there are, or on the thread.
#pragma once
#include <cstdint>
#include <vector>

#include "core/config.h"
#include "formats/format.h"

namespace codefuse::cpu {

constexpr int kBlockRows = 16;  // weight rows that all tokens use before the next ones

// y[t, n] = act(x[t] . w[n] + bias[n]), or += when accumulate
struct MatmulArgs {
  HostMatrix w;                   // [N, K]
  const float* bias = nullptr;    // [N] or nullptr
  const float* x = nullptr;       // [T, K]
  int64_t tokens = 0;             // T
  float* y = nullptr;             // [T, N]
  bool accumulate = false;
  const Activation* act = nullptr;
};

// One head of one row: out = softmax(q k^T scale) v over positions first .. last
struct AttendArgs {
  const float* q = nullptr;         // [D]
  float* out = nullptr;             // [D]
  const float* k = nullptr;         // this kv head in page 0: [kPageTokens, D]
  const float* v = nullptr;
  int64_t page_stride = 0;          // floats from a page to the next
  const int32_t* pages = nullptr;   // the sequence's page table
  int head_dim = 0;
  int first = 0, last = 0;
  float scale = 1.f;
  bool fetch = false;               // few rows: keys and values are not in a cache yet
};

struct Kernels {
  const char* name;
  void (*matmul)(const MatmulArgs& a, int64_t begin, int64_t end);  // outputs [begin, end)
  void (*attend)(const AttendArgs& a, float* scores /*[last - first + 1]*/);
  void (*activate)(float* x, int64_t n, Activation act);
  void (*gate)(float* y, const float* gate, const float* up, int64_t n, Activation act);  // y = act(gate) * up
  void (*norm)(float* y, const float* x, const float* weight, const float* bias, NormKind kind, float eps, int n);
  // The arithmetic of sampling (ops/sampling_rule.h) over many tokens; the results do not depend on the instruction set.
  void (*order_keys)(uint32_t* key, const float* logits, int64_t n);
  // d = (logit - top) / temperature, w = exp(d)
  void (*weigh)(float* d, float* w, const float* logits, float top, float temperature, int64_t n);
  void (*noise)(float* out /*[4 groups]*/, uint64_t seed, int32_t position, int32_t first_group, int32_t groups);
  double (*sum_exp)(const float* logits, float top, int64_t n);  // sum of exp(logit - top)
};

const Kernels* generic_kernels();
const Kernels* avx2_kernels();    // nullptr where the compiler or the processor has none
const Kernels* avx512_kernels();

std::vector<const Kernels*> usable_kernels();  // what this processor runs, best first

}  // namespace codefuse::cpu
