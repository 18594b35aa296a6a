// Prefill products of q4_g64 on Hopper.
#include "cuda/linear_prefill_launch.cuh"

namespace codefuse::cuda::prefill {

template void choose<Weights4<__half, 64>>(const Stream&, DType, const Args&, const void* const (&)[2]);
template void choose<Weights4<__nv_bfloat16, 64>>(const Stream&, DType, const Args&, const void* const (&)[2]);

}  // namespace codefuse::cuda::prefill
