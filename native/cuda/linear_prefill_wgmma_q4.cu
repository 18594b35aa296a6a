// Prefill products of q4_g128 on Hopper.
#include "cuda/linear_prefill_launch.cuh"

namespace codefuse::cuda::prefill {

template void choose<Weights4<__half, 128>>(const Stream&, DType, const Args&, const void* const (&)[2]);
template void choose<Weights4<__nv_bfloat16, 128>>(const Stream&, DType, const Args&, const void* const (&)[2]);

}  // namespace codefuse::cuda::prefill
