// Which of the prefill products on Hopper a format takes; those of 16-bit weights are compiled here, the others in files of their own.
#include "cuda/linear_prefill_wgmma.cuh"

namespace codefuse::cuda {

namespace prefill {
#define CODEFUSE_ELSEWHERE(...) \
  extern template void choose<__VA_ARGS__>(const Stream&, DType, const void*, const void*, const float*, int, int, int, const PrefillScratch&, const Epilogue&);
CODEFUSE_ELSEWHERE(Weights8<__half>)
CODEFUSE_ELSEWHERE(Weights8<__nv_bfloat16>)
CODEFUSE_ELSEWHERE(Weights4<__half, 128>)
CODEFUSE_ELSEWHERE(Weights4<__nv_bfloat16, 128>)
CODEFUSE_ELSEWHERE(Weights4<__half, 64>)
CODEFUSE_ELSEWHERE(Weights4<__nv_bfloat16, 64>)
#undef CODEFUSE_ELSEWHERE
}  // namespace prefill

bool has_wgmma() {
  cudaFuncAttributes code;
  return cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(prefill::Kernel(prefill::gemm<Weights16<__half>, 128>))) == cudaSuccess &&
         code.sharedSizeBytes >= sizeof(prefill::Barriers);
}

void prefill_linear_wgmma(const Stream& s, DType act, const void* x, const void* w, int T, int N, int K, const PrefillScratch& scratch, const Epilogue& e) {
  act == DType::f16 ? prefill::choose<Weights16<__half>>(s, act, x, w, nullptr, T, N, K, scratch, e)
                    : prefill::choose<Weights16<__nv_bfloat16>>(s, act, x, w, nullptr, T, N, K, scratch, e);
}

void prefill_linear_quantized(const Stream& s, DType act, Format format, const void* x, const void* w, int T, int N, int K, const PrefillScratch& scratch,
                              const Epilogue& e) {
  const float* scale = row_scales(format, w, N, K);
  const auto run = [&](auto weights) { prefill::choose<decltype(weights)>(s, act, x, w, scale, T, N, K, scratch, e); };
  act == DType::f16 ? with_quantized<__half>(format, run) : with_quantized<__nv_bfloat16>(format, run);
}

}  // namespace codefuse::cuda
