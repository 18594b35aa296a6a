// The inner loops for x86-64 processors with AVX2, FMA and F16C. The pragma stays in force to the end of the file, because
// templates are compiled there.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "ops/batch.h"
#include "ops/sampling_rule.h"

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
  static constexpr int width = 8, rows = 2, tokens = 6;
  static V zero() { return _mm256_setzero_ps(); }
  static V set(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static V load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void load_u4(const uint8_t* p, V& low, V& high) {
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    low = _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15)));
    high = _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4));
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static __m128 fold(V v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
  static float sum(V v) {
    const __m128 x = fold(v), y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static void sum4(V a, V b, V c, V d, float* out) {
    const __m128 w = fold(a), x = fold(b), y = fold(c), z = fold(d);
    const __m128 wx = _mm_add_ps(_mm_unpacklo_ps(w, x), _mm_unpackhi_ps(w, x));  // w0+w2, x0+x2, w1+w3, x1+x3
    const __m128 yz = _mm_add_ps(_mm_unpacklo_ps(y, z), _mm_unpackhi_ps(y, z));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(wx, yz), _mm_movehl_ps(yz, wx)));
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
