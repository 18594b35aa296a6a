// Linear layers of decode rows: which matrices one launch of the streaming kernel (stream_matrix.cuh) goes through.
#include "cuda/stream_matrix.cuh"

namespace codefuse::cuda {

namespace {

// Bytes of shared memory left of a multiprocessor.
int run(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const LinearInput* in_b, const LinearOutput* out_b,
        const SplitScratch& scratch, int32_t* ready = nullptr) {
  if (is_quantized(in.format)) return stream::product_quantized(s, act, T, in, out, in_b, out_b, scratch, ready);
  return act == DType::f16 ? stream::product<Weights16<__half>>(s, act, T, in, out, in_b, out_b, scratch, ready)
                           : stream::product<Weights16<__nv_bfloat16>>(s, act, T, in, out, in_b, out_b, scratch, ready);
}

}  // namespace

void decode_linear(const Stream& s, DType act, int T, const LinearInput& in, const LinearOutput& out, const SplitScratch& scratch) {
  run(s, act, T, in, out, nullptr, nullptr, scratch);
}

void decode_linear_pair(const Stream& s, DType act, int T, const LinearInput& in_a, const LinearOutput& out_a, const LinearInput& in_b,
                        const LinearOutput& out_b, const SplitScratch& scratch, Ready& ready) {
  ready.room = run(s, act, T, in_a, out_a, &in_b, &out_b, scratch, ready.counter);
}

int ready_count(int N) { return int(groups_of(N)) * 16; }  // by row tiles

void decode_linear_sum(const Stream& s, DType act, int T, const LinearInput& in_a, const LinearInput& in_b, const LinearOutput& out,
                       const SplitScratch& scratch) {
  run(s, act, T, in_a, out, &in_b, nullptr, scratch);
}

}  // namespace codefuse::cuda
