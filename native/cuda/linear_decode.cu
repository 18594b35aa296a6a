// Linear layers of decode rows: which matrices one launch of the streaming kernel (stream_matrix.cuh) goes through.
#include <climits>

#include "cuda/stream_matrix.cuh"

namespace codefuse::cuda {

namespace {

// 16-bit weights, the chunks of tiles.cuh
template <class T>
struct Plain {
  using Type = T;
  static constexpr int kBytes = kChunkBytes, kCols = kChunkCols;
  static constexpr stream::Scale kScale = stream::Scale::none;
  static __device__ __forceinline__ void fragments(uint4 (&a)[4], const uint8_t* chunk, int tile, int, int lane) {
#pragma unroll
    for (int s = 0; s < 4; ++s) a[s] = *reinterpret_cast<const uint4*>(chunk + tile * kRowTileBytes + s * 512 + lane * 16);
  }
};

template <class W>
stream::Source source(const DecodeInput& in) {
  stream::Source s{};
  s.x = static_cast<const uint8_t*>(in.x);
  s.w = static_cast<const uint8_t*>(in.w);
  s.K = in.K;
  s.steps = (in.K + W::kCols - 1) / W::kCols;
  return s;
}

// b: nullptr, or a second product (out_b given) or a second part of K
template <class W>
void run(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const DecodeInput* in_b, const DecodeOutput* out_b,
         const SplitScratch& scratch) {
  stream::Args a{};
  a.T = T;
  a.partial = scratch.partial;
  a.source[0] = source<W>(in);
  if (in_b) a.source[1] = source<W>(*in_b);
  a.join = in_b && !out_b ? a.source[0].steps : INT_MAX;
  a.output[0] = {out.N, int(groups_of(out.N)), a.source[0].steps + (in_b && !out_b ? a.source[1].steps : 0), out.epilogue};
  if (out_b) a.output[1] = {out_b->N, int(groups_of(out_b->N)), a.source[1].steps, out_b->epilogue};
  const int64_t split = int64_t(a.output[0].groups) * a.output[0].steps, chunks = split + int64_t(a.output[1].groups) * a.output[1].steps;
  if ((chunks + 1) * s.sms >= int64_t(UINT32_MAX)) throw DeviceError(cat("CUDA: a matrix of ", chunks, " chunks is too large"));
  a.split = uint32_t(split);
  a.chunks = uint32_t(chunks);
  stream::stream_rows<W>(s, act, a);
}

void run(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const DecodeInput* in_b, const DecodeOutput* out_b,
         const SplitScratch& scratch) {
  act == DType::f16 ? run<Plain<__half>>(s, act, T, in, out, in_b, out_b, scratch) : run<Plain<__nv_bfloat16>>(s, act, T, in, out, in_b, out_b, scratch);
}

}  // namespace

void decode_linear(const Stream& s, DType act, int T, const DecodeInput& in, const DecodeOutput& out, const SplitScratch& scratch) {
  run(s, act, T, in, out, nullptr, nullptr, scratch);
}

void decode_linear_pair(const Stream& s, DType act, int T, const DecodeInput& in_a, const DecodeOutput& out_a, const DecodeInput& in_b,
                        const DecodeOutput& out_b, const SplitScratch& scratch) {
  run(s, act, T, in_a, out_a, &in_b, &out_b, scratch);
}

void decode_linear_sum(const Stream& s, DType act, int T, const DecodeInput& in_a, const DecodeInput& in_b, const DecodeOutput& out,
                       const SplitScratch& scratch) {
  run(s, act, T, in_a, out, &in_b, nullptr, scratch);
}

}  // namespace codefuse::cuda
