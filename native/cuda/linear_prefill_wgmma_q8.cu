// Prefill products of q8_row on Hopper.
#include "cuda/linear_prefill_wgmma.cuh"

namespace codefuse::cuda::prefill {

template void choose<Weights8<__half>>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);
template void choose<Weights8<__nv_bfloat16>>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);

}  // namespace codefuse::cuda::prefill
