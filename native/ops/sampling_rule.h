// The arithmetic of sampling, written once for host and device so that equal logits give equal tokens on every device.
// Each operation is a single IEEE float32 operation: mul() and add() are never contracted into a fused multiply-add.
// The rule itself, in order, is in native/cpu/sample.cc.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CODEFUSE_HD __host__ __device__ __forceinline__
#else
#define CODEFUSE_HD inline __attribute__((always_inline))  // so that loops over them vectorize
#endif

namespace codefuse::rule {

CODEFUSE_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

CODEFUSE_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

CODEFUSE_HD float div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

CODEFUSE_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

CODEFUSE_HD float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

// Greater float <=> greater key. NaN is the least (below -inf), -0 equals +0.
CODEFUSE_HD uint32_t order_key(float x) {
  uint32_t u = bits_of(add(x, 0.f));
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0;
  return (u & 0x80000000u) ? ~u : (u | 0x80000000u);
}
// The float of a key; of 0 NaN.
CODEFUSE_HD float float_of_key(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// LogitEdit (batch.h)
CODEFUSE_HD float edited(float logit, float add_to_it, float penalty) {
  const float l = penalty == 1.f ? logit : logit > 0.f ? div(logit, penalty) : mul(logit, penalty);
  return add(l, add_to_it);
}

CODEFUSE_HD bool allows(const uint32_t* mask, int token) { return (mask[token / 32] >> (token % 32) & 1u) != 0; }

// log(1 + f) + e log 2 for sqrt(1/2) - 1 <= f < sqrt(2) - 1 (Cephes; within 1 ulp)
CODEFUSE_HD float log_core(float f, float e) {
  float z = mul(f, f);
  float p = 7.0376836292e-2f;
  p = add(mul(p, f), -1.1514610310e-1f);
  p = add(mul(p, f), 1.1676998740e-1f);
  p = add(mul(p, f), -1.2420140846e-1f);
  p = add(mul(p, f), 1.4249322787e-1f);
  p = add(mul(p, f), -1.6668057665e-1f);
  p = add(mul(p, f), 2.0000714765e-1f);
  p = add(mul(p, f), -2.4999993993e-1f);
  p = add(mul(p, f), 3.3333331174e-1f);
  float y = mul(mul(p, f), z);
  y = add(y, mul(e, -2.12194440e-4f));
  y = add(y, mul(z, -0.5f));
  return add(add(f, y), mul(e, 0.693359375f));
}

// x = (1 + f) 2^e, normal x > 0
CODEFUSE_HD void split(float x, float& f, float& e) {
  uint32_t u = bits_of(x);
  float m = float_of((u & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  bool low = m < 0.707106781f;
  f = add(low ? add(m, m) : m, -1.f);
  e = float(int(u >> 23) - 126 - int(low));
}

// log(x), normal x > 0
CODEFUSE_HD float log_of(float x) {
  float f, e;
  split(x, f, e);
  return log_core(f, e);
}

// exp(x) for x <= 0; 0 below -80 (Cephes)
CODEFUSE_HD float exp_of(float x) {
  if (!(x >= -80.f)) return 0.f;
  float n = floorf(add(mul(x, 1.44269504088896341f), 0.5f));
  float r = add(x, mul(n, -0.693359375f));
  r = add(r, mul(n, 2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = add(mul(p, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  float y = add(add(mul(p, mul(r, r)), r), 1.f);
  return mul(y, float_of(uint32_t(int(n) + 127) << 23));
}

// Masses are integers, so that a sum does not depend on its order: 2^40 is probability relative to the greatest logit 1.
// A vocabulary of 2^23 cannot overflow uint64.
CODEFUSE_HD uint64_t mass_of(float weight /*[0, 1]*/) { return uint64_t(mul(weight, 1099511627776.f)); }

// Least mass that top_p asks for of `total`: at least 1, at most total.
CODEFUSE_HD uint64_t mass_needed(float top_p, uint64_t total) {
  double need = ceil(double(top_p) * double(total));
  uint64_t n = need < 1.0 ? 1 : uint64_t(need);
  return n < total ? n : total;
}

// Philox4x32-10 (Salmon et al., 2011): out = four random words of counter under key.
CODEFUSE_HD void philox(const uint32_t counter[4], uint64_t key, uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// -log(-log(u)) for u = 1 - v, v = (word + 1/2) 2^-32: fine steps where the value is great, -2.8 .. 22.9
CODEFUSE_HD float gumbel_of(uint32_t word) {
  float v = mul(add(float(word), 0.5f), 2.3283064365386963e-10f);
  v = v < 0.99999994f ? v : 0.99999994f;
  float f, e;
  split(add(1.f, -v), f, e);
  if (v < 0.29289f) f = -v;  // e is 0; 1 - v has rounded, v has not
  return -log_of(-log_core(f, e));
}

// Noise of four neighbouring tokens 4*group .. 4*group + 3, for the token to be placed at `position`.
CODEFUSE_HD void gumbel4(uint64_t seed, int32_t position, int32_t group, float out[4]) {
  uint32_t counter[4] = {uint32_t(group), uint32_t(position), 0, 0}, words[4];
  philox(counter, seed, words);
  for (int i = 0; i < 4; ++i) out[i] = gumbel_of(words[i]);
}

}  // namespace codefuse::rule
