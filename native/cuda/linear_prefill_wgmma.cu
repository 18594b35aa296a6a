// Which of the prefill products on Hopper a format takes; those of 16-bit weights are compiled here, the others in files of their own.
#include "cuda/linear_prefill_launch.cuh"

namespace codefuse::cuda {

namespace prefill {
#define CODEFUSE_ELSEWHERE(...) extern template void choose<__VA_ARGS__>(const Stream&, DType, const Args&, const void* const (&)[2]);
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
  return cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(prefill::Kernel(prefill::gemm<Weights16<__half>, 128, 8>))) == cudaSuccess &&
         code.sharedSizeBytes >= sizeof(prefill::Barriers);
}

void prefill_linear_wgmma(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const LinearInput* in_b, const LinearOutput* out_b,
                          const PrefillScratch& scratch) {
  prefill::Args a{};
  a.tokens = T;
  a.scratch = scratch;
  const void* x[2] = {in.x, in_b ? in_b->x : nullptr};
  const auto source = [](const LinearInput& i) { return prefill::Source{static_cast<const uint8_t*>(i.w), int(steps_of(i.K))}; };
  const auto product = [](const LinearInput& i, const LinearOutput& o) { return prefill::Product{row_scales(i.format, i.w, o.N, i.K), o.N, false, o.epilogue}; };
  a.source[0] = source(in);
  a.product[0] = product(in, out);
  a.chunks = a.source[0].chunks;
  a.join = INT_MAX;
  if (in_b) {
    a.source[1] = source(*in_b);
    if (out_b)
      a.product[1] = product(*in_b, *out_b);
    else
      a.join = a.chunks, a.chunks += a.source[1].chunks;
  }
  const auto run = [&](auto weights) { prefill::choose<decltype(weights)>(s, act, a, x); };
  const auto of = [&](auto zero) {
    using T16 = decltype(zero);
    is_quantized(in.format) ? with_quantized<T16>(in.format, run) : run(Weights16<T16>());
  };
  act == DType::f16 ? of(__half()) : of(__nv_bfloat16());
}

}  // namespace codefuse::cuda
