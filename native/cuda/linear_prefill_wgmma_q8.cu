// Prefill products of q8_row on Hopper.
#include "cuda/linear_prefill_launch.cuh"

namespace codefuse::cuda::prefill {

template void choose<Weights8<__half>>(const Stream&, DType, const Args&, const void* const (&)[2]);
template void choose<Weights8<__nv_bfloat16>>(const Stream&, DType, const Args&, const void* const (&)[2]);

}  // namespace codefuse::cuda::prefill
