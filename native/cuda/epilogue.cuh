// What becomes of one output z of a linear layer.
#pragma once
#include "cuda/kernels.h"

namespace codefuse::cuda {

__device__ __forceinline__ float activate(float z, int fn) {
  switch (fn) {
    case int(Activation::gelu): return 0.5f * z * (1.f + erff(z * 0.70710678118654752f));
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
