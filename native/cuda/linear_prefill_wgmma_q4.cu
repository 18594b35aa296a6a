// Prefill products of q4_g128 on Hopper.
#include "cuda/linear_prefill_wgmma.cuh"

namespace codefuse::cuda::prefill {

template void choose<Weights4<__half, 128>>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);
template void choose<Weights4<__nv_bfloat16, 128>>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);

}  // namespace codefuse::cuda::prefill
