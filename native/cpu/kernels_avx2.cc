// The inner loops for x86-64 processors with AVX2, FMA and F16C. The pragma stays in force to the end of the file, because
// templates are compiled there.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "ops/batch.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace codefuse::cpu {

namespace {

struct S {
  using V = __m256;
  static constexpr const char* name = "avx2";
  static constexpr int width = 8, rows = 4, tokens = 3;
  static V zero() { return _mm256_setzero_ps(); }
  static V set(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static float sum(V v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
};

#include "cpu/kernels_body.h"

}  // namespace

const Kernels* avx2_kernels() {
  static const bool usable = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return usable ? &kTable : nullptr;
}

}  // namespace codefuse::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace codefuse::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace codefuse::cpu
#endif
