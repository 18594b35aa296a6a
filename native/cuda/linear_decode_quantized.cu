// linear_decode.cu's launches for quantized weights.
#include "cuda/stream_matrix.cuh"

namespace codefuse::cuda::stream {

void product_quantized(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const DecodeInput* in_b,
                       const DecodeOutput* out_b, const SplitScratch& scratch, int32_t* ready) {
  const bool half = act == DType::f16;
  if (in.format == Format::q8_row)
    half ? product<Weights8<__half>>(s, act, T, in, out, in_b, out_b, scratch, ready) : product<Weights8<__nv_bfloat16>>(s, act, T, in, out, in_b, out_b, scratch, ready);
  else
    half ? product<Weights4<__half>>(s, act, T, in, out, in_b, out_b, scratch, ready) : product<Weights4<__nv_bfloat16>>(s, act, T, in, out, in_b, out_b, scratch, ready);
}

}  // namespace codefuse::cuda::stream
