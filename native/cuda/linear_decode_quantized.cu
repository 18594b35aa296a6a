// linear_decode.cu's launches for quantized weights.
#include "cuda/stream_matrix.cuh"

namespace codefuse::cuda::stream {

int product_quantized(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const LinearInput* in_b,
                      const LinearOutput* out_b, const SplitScratch& scratch, int32_t* ready) {
  const auto run = [&](auto weights) { return product<decltype(weights)>(s, act, T, in, out, in_b, out_b, scratch, ready); };
  return act == DType::f16 ? with_quantized<__half>(in.format, run) : with_quantized<__nv_bfloat16>(in.format, run);
}

}  // namespace codefuse::cuda::stream
