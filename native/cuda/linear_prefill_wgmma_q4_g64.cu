// Prefill products of q4_g64 on Hopper.
#include "cuda/linear_prefill_wgmma.cuh"

namespace codefuse::cuda::prefill {

template void choose<Weights4<__half, 64>>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);
template void choose<Weights4<__nv_bfloat16, 64>>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);

}  // namespace codefuse::cuda::prefill
