// The inner loops for any processor, and the choice between them.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "ops/batch.h"
#include "ops/sampling_rule.h"

namespace codefuse::cpu {

namespace {

struct S {
  typedef float V __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr const char* name = "generic";
  static constexpr int width = 4, rows = 4, tokens = 2;
  static V zero() { return V{}; }
  static V set(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static V load_f16(const uint16_t* p) {
    uint16_t h[4];
    __builtin_memcpy(h, p, 8);
    const U u = {h[0], h[1], h[2], h[3]};
    const V scaled = (V)((u & 0x7fffu) << 13) * 5.192296858534828e33f;  // 2^112: the difference of the exponent biases
    const U special = (U)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;      // infinities and NaN
    return (V)((U)scaled | special | (u & 0x8000u) << 16);
  }
  static V load_bf16(const uint16_t* p) {
    uint16_t h[4];
    __builtin_memcpy(h, p, 8);
    const U u = {h[0], h[1], h[2], h[3]};
    return (V)(u << 16);
  }
  static V load_i8(const int8_t* p) { return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
  static void load_u4(const uint8_t* p, V& low, V& high) {
    low = V{float(p[0] & 15), float(p[1] & 15), float(p[2] & 15), float(p[3] & 15)};
    high = V{float(p[0] >> 4), float(p[1] >> 4), float(p[2] >> 4), float(p[3] >> 4)};
  }
  static void store(float* p, V v) { __builtin_memcpy(p, &v, 16); }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void sum4(V a, V b, V c, V d, float* out) { out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d); }
};

#include "cpu/kernels_body.h"

}  // namespace

const Kernels* generic_kernels() { return &kTable; }

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> all;
  for (const Kernels* k : {avx512_kernels(), avx2_kernels(), generic_kernels()})
    if (k) all.push_back(k);
  return all;
}

}  // namespace codefuse::cpu
