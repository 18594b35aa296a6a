// What becomes of one output z of a linear layer.
#pragma once
#include "cuda/kernels.h"

namespace codefuse::cuda {

// z (1 + erf(z / sqrt 2)) / 2 as max(z, 0) - |z| erfc(|z| / sqrt 2) / 2, with erfc(x) = 2^(x p(x)), p of degree 7 fitted to 0 .. 5.5 and falling on to
// 2^-385, which is 0: within 5e-7 |z|, and for negative z, where 1 + erf cancels, within a hundredth of the result down to -6.
__device__ __forceinline__ float gelu(float z) {
  const float x = fminf(fabsf(z) * 0.70710678118654752f, 10.f);
  float p = -1.0247744285152294e-05f;
  p = fmaf(p, x, 1.1476300278445706e-04f);
  p = fmaf(p, x, -2.3566825257148594e-04f);
  p = fmaf(p, x, -3.2255894038826227e-03f);
  p = fmaf(p, x, 3.0876843258738518e-02f);
  p = fmaf(p, x, -0.14997822046279907f);
  p = fmaf(p, x, -0.9180130362510681f);
  p = fmaf(p, x, -1.6279451847076416f);
  float erfc, positive;  // not a number stays that
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(erfc) : "f"(p * x));
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(z));
  return fmaf(x * -0.70710678118654752f, erfc, positive);
}

__device__ __forceinline__ float activate(float z, int fn) {
  switch (fn) {
    case int(Activation::gelu): return gelu(z);
    case int(Activation::gelu_tanh): return 0.5f * z * (1.f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    case int(Activation::relu): return fmaxf(z, 0.f);
    case int(Activation::silu): return z / (1.f + __expf(-z));
    default: return z;
  }
}

// z of output n and row t into y [T, N]
template <class T>
__device__ __forceinline__ void store_output(const Epilogue& e, float z, int64_t t, int n, int N) {
  if (e.bias) z += e.bias[n];
  if (e.bias_b) z += e.bias_b[n];
  int64_t i = t * N + n;
  if (e.store == Store::add)
    static_cast<float*>(e.y)[i] += z;
  else if (e.store == Store::f32)
    static_cast<float*>(e.y)[i] = z;
  else
    static_cast<T*>(e.y)[i] = from_float<T>(activate(z, e.activation));
}

}  // namespace codefuse::cuda
