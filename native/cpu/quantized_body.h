// Matrix products with 4-bit weights in groups of Group columns, decoded in registers to the values that decode_row() gives. Part of kernels_body.h.

// As tile() there: outputs [n, n + R) of tokens [t, t + M), one vector accumulator each, in the same order for every R and M.
template <int Group, int R, int M>
inline void finish_tile4(const MatmulArgs& a, int64_t n, int64_t t) {
  constexpr int kHalf = Group / 2;
  const int64_t k = a.w.cols, groups = k / Group;
  const float* x = a.x + t * k;
  const uint8_t* row[R];
  V acc[R][M];
  for (int r = 0; r < R; ++r) {
    row[r] = a.w.data + size_t(n + r) * a.w.stride;
    for (int m = 0; m < M; ++m) acc[r][m] = S::zero();
  }
  for (int64_t g = 0; g < groups; ++g, x += Group) {
    V scale[R], zero[R];
    for (int r = 0; r < R; ++r) {
      uint16_t h[S::width] = {};
      __builtin_memcpy(h, a.w.scale.row(n + r) + 2 * g, 2);
      float wide[S::width];
      S::store(wide, S::load_f16(h));
      scale[r] = S::set(wide[0]);
      zero[r] = S::set(float(a.w.zero.row(n + r)[g]));
      __builtin_prefetch(row[r] + g * kHalf + 2048, 0, 2);
    }
    for (int i = 0; i < kHalf; i += S::width)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        V low, high;
        S::load_u4(row[r] + g * kHalf + i, low, high);
        low = S::fma(S::sub(low, zero[r]), scale[r], S::zero());
        high = S::fma(S::sub(high, zero[r]), scale[r], S::zero());
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[r][m] = S::fma(high, load(x + m * k + i + kHalf), S::fma(low, load(x + m * k + i), acc[r][m]));
      }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      float* y = a.y + (t + m) * a.w.rows + n + r;
      float v = S::sum(acc[r][m]);
      if (a.bias) v += a.bias[n + r];
      *y = a.accumulate ? *y + v : v;
    }
}

template <int Group, int M>
inline void tokens4(const MatmulArgs& a, int64_t begin, int64_t end, int64_t t) {
  int64_t n = begin;
  for (; n + S::rows <= end; n += S::rows) finish_tile4<Group, S::rows, M>(a, n, t);
  for (; n < end; ++n) finish_tile4<Group, 1, M>(a, n, t);
}

template <int Group>
void matmul4(const MatmulArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kBlockRows) {  // a block of weights stays in the cache for all tokens
    const int64_t stop = n + kBlockRows < end ? n + kBlockRows : end;
    int64_t t = 0;
    for (; t + S::tokens <= a.tokens; t += S::tokens) tokens4<Group, S::tokens>(a, n, stop, t);
    for (; t + 2 <= a.tokens; t += 2) tokens4<Group, 2>(a, n, stop, t);
    for (; t < a.tokens; ++t) tokens4<Group, 1>(a, n, stop, t);
  }
}
