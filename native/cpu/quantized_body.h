// Matrix products with q4_g128 weights: a few rows are decoded, to the values that decode_row() gives, and used by all tokens.
// Part of kernels_body.h.

inline void decode_q4(const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, int64_t k, float* out) {
  constexpr int kHalf = kGroupCols / 2;
  for (int64_t g = 0; g < k / kGroupCols; ++g, codes += kHalf, out += kGroupCols) {
    uint16_t h[S::width] = {};
    __builtin_memcpy(h, scales + 2 * g, 2);
    float wide[S::width];
    S::store(wide, S::load_f16(h));
    const V scale = S::set(wide[0]), zero = S::set(float(zeros[g]));
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; i += S::width) {
      V low, high;
      S::load_u4(codes + i, low, high);
      S::store(out + i, S::fma(S::sub(low, zero), scale, S::zero()));
      S::store(out + i + kHalf, S::fma(S::sub(high, zero), scale, S::zero()));
    }
  }
}

void matmul_decoded(const MatmulArgs& a, int64_t begin, int64_t end, float* decoded /*[kDecodedRows, K]*/) {
  const int64_t k = a.w.cols;
  MatmulArgs part = a;
  part.w.format = Format::f32;
  part.w.data = reinterpret_cast<const uint8_t*>(decoded);
  part.w.stride = size_t(k) * sizeof(float);
  for (int64_t n = begin; n < end; n += kDecodedRows) {
    const int64_t rows = n + kDecodedRows < end ? kDecodedRows : end - n;
    for (int64_t r = 0; r < rows; ++r)
      decode_q4(a.w.data + size_t(n + r) * a.w.stride, a.w.scale.row(n + r), a.w.zero.row(n + r), k, decoded + r * k);
    part.bias = a.bias ? a.bias + n : nullptr;
    part.y = a.y + n;
    if (a.tokens == 1)
      tokens<1, false>(part, decoded, 0, rows, 0);
    else
      matmul_rows<float>(part, 0, rows);
  }
}
