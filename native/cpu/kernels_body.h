// Bodies of cpu/kernels.h over a struct S of the instruction set (see kernels_generic.cc): V, width, rows, tokens (a register
// tile of the matrix product), zero, set, load of float, F16 and BF16, fma, mul, add, sub, sum. Included once per instruction
// set, inside its namespace; no standard library templates, whose copies the linker would share between instruction sets.

using V = S::V;

struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };

inline V load(const float* p) { return S::load(p); }
inline V load(const F16* p) { return S::load_f16(reinterpret_cast<const uint16_t*>(p)); }
inline V load(const BF16* p) { return S::load_bf16(reinterpret_cast<const uint16_t*>(p)); }

// The first n < width elements, then zeros.
template <class E>
inline V load_part(const E* p, int64_t n) {
  E part[S::width] = {};
  __builtin_memcpy(part, p, size_t(n) * sizeof(E));
  return load(part);
}

// ---- matrix product --------------------------------------------------------------------------------------------------

// out[r][m] = w[r] . x[m]: one vector accumulator each, lane l takes elements l, l + width, ...; the same for every R and M.
template <int R, int M, class E>
inline void tile(const E* w, size_t w_stride /*bytes*/, const float* x, int64_t x_stride, int64_t k_size, float out[R][M]) {
  const E* row[R];
  for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const E*>(reinterpret_cast<const char*>(w) + r * w_stride);
  V acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = S::zero();
  int64_t k = 0;
  for (; k + S::width <= k_size; k += S::width) {
    V wv[R];
    for (int r = 0; r < R; ++r) wv[r] = load(row[r] + k);
    for (int m = 0; m < M; ++m) {
      const V xv = load(x + m * x_stride + k);
      for (int r = 0; r < R; ++r) acc[r][m] = S::fma(wv[r], xv, acc[r][m]);
    }
  }
  if (k < k_size) {
    V wv[R];
    for (int r = 0; r < R; ++r) wv[r] = load_part(row[r] + k, k_size - k);
    for (int m = 0; m < M; ++m) {
      const V xv = load_part(x + m * x_stride + k, k_size - k);
      for (int r = 0; r < R; ++r) acc[r][m] = S::fma(wv[r], xv, acc[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r][m] = S::sum(acc[r][m]);
}

// Outputs [n, n + R) of tokens [t, t + M); w points at row n.
template <int R, int M, class E>
inline void finish_tile(const MatmulArgs& a, const E* w, size_t w_stride, int64_t n, int64_t t) {
  float out[R][M];
  tile<R, M>(w, w_stride, a.x + t * a.w.cols, a.w.cols, a.w.cols, out);
  for (int m = 0; m < M; ++m) {
    float* y = a.y + (t + m) * a.w.rows + n;
    for (int r = 0; r < R; ++r) {
      float v = out[r][m];
      if (a.bias) v += a.bias[n + r];
      y[r] = a.accumulate ? y[r] + v : v;
    }
  }
}

template <int R, class E>
inline void tokens_of_rows(const MatmulArgs& a, const E* w, size_t w_stride, int64_t n) {
  constexpr int M = S::tokens;
  int64_t t = 0;
  for (; t + M <= a.tokens; t += M) finish_tile<R, M>(a, w, w_stride, n, t);
  if constexpr (M > 4)
    for (; t + 4 <= a.tokens; t += 4) finish_tile<R, 4>(a, w, w_stride, n, t);
  for (; t + 2 <= a.tokens; t += 2) finish_tile<R, 2>(a, w, w_stride, n, t);
  for (; t < a.tokens; ++t) finish_tile<R, 1>(a, w, w_stride, n, t);
}

template <class E>
inline const E* at_row(const E* w, size_t w_stride, int64_t r) {
  return reinterpret_cast<const E*>(reinterpret_cast<const char*>(w) + size_t(r) * w_stride);
}

template <class E>
void matmul_rows(const MatmulArgs& a, int64_t begin, int64_t end, float* scratch) {
  constexpr int R = S::rows;
  const E* w = reinterpret_cast<const E*>(a.w.data);
  const int64_t k_size = a.w.cols;
  int64_t n = begin;
  if (a.tokens == 1) {  // more rows at once: as many streams of weights
    for (; n + 2 * R <= end; n += 2 * R) finish_tile<2 * R, 1>(a, at_row(w, a.w.stride, n), a.w.stride, n, 0);
  }
  if (a.tokens <= S::tokens) {
    for (; n + R <= end; n += R) tokens_of_rows<R>(a, at_row(w, a.w.stride, n), a.w.stride, n);
    for (; n < end; ++n) tokens_of_rows<1>(a, at_row(w, a.w.stride, n), a.w.stride, n);
    return;
  }
  const size_t stride = size_t(k_size) * sizeof(float);
  for (; n < end; n += kDecodedRows) {
    const int64_t rows = end - n < kDecodedRows ? end - n : kDecodedRows;
    for (int64_t r = 0; r < rows; ++r) {
      const E* from = at_row(w, a.w.stride, n + r);
      int64_t k = 0;
      for (; k + S::width <= k_size; k += S::width) S::store(scratch + r * k_size + k, load(from + k));
      float part[S::width];
      S::store(part, load_part(from + k, k_size - k));
      __builtin_memcpy(scratch + r * k_size + k, part, size_t(k_size - k) * sizeof(float));
    }
    for (int64_t t = 0; t < a.tokens; t += S::tokens) {
      MatmulArgs some = a;
      some.x = a.x + t * k_size;
      some.y = a.y + t * a.w.rows;
      some.tokens = a.tokens - t < S::tokens ? a.tokens - t : S::tokens;
      int64_t r = 0;
      for (; r + R <= rows; r += R) tokens_of_rows<R>(some, scratch + r * k_size, stride, n + r);
      for (; r < rows; ++r) tokens_of_rows<1>(some, scratch + r * k_size, stride, n + r);
    }
  }
}

void activate(float* x, int64_t n, Activation act);

void matmul(const MatmulArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.w.format) {
    case Format::f32: matmul_rows<float>(a, begin, end, scratch); break;
    case Format::f16: matmul_rows<F16>(a, begin, end, scratch); break;
    case Format::bf16: matmul_rows<BF16>(a, begin, end, scratch); break;
  }
  if (a.act)
    for (int64_t t = 0; t < a.tokens; ++t) activate(a.y + t * a.w.rows + begin, end - begin, *a.act);
}

// ---- element by element; plain loops that the compiler vectorizes --------------------------------------------------------

// exp(x) within 2 ulp (Cephes), 0 below -87, inf above 88.7
inline float exp_of(float x) {
  const float c = x < -88.f ? -88.f : x > 89.f ? 89.f : x;
  const float n = __builtin_floorf(c * 1.44269504088896341f + 0.5f);
  const float r = c - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.f;
  const int32_t half = int32_t(n) / 2, rest = int32_t(n) - half;  // 2^n in two steps: n reaches 128
  const uint32_t a = uint32_t(half + 127) << 23, b = uint32_t(rest + 127) << 23;
  float fa, fb;
  __builtin_memcpy(&fa, &a, 4);
  __builtin_memcpy(&fb, &b, 4);
  const float v = y * fa * fb;
  return x < -87.f ? 0.f : x != x ? x : v;
}

// erf(x) within 3e-7 (rational approximation on [-4, 4])
inline float erf_of(float x) {
  const float c = x < -4.f ? -4.f : x > 4.f ? 4.f : x, z = c * c;
  float p = -2.72614225801306e-10f;
  p = p * z + 2.77068142495902e-08f;
  p = p * z + -2.10102402082508e-06f;
  p = p * z + -5.69250639462346e-05f;
  p = p * z + -7.34990630326855e-04f;
  p = p * z + -2.95459980854025e-03f;
  p = p * z + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * z + -2.13374055278905e-04f;
  q = q * z + -1.68282697438203e-03f;
  q = q * z + -7.37332916720468e-03f;
  q = q * z + -1.42647390514189e-02f;
  return c * p / q;
}

inline float gelu(float x) { return 0.5f * x * (1.f + erf_of(x * 0.70710678118654752f)); }
// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
inline float gelu_tanh(float x) { return x / (1.f + exp_of(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }
inline float silu(float x) { return x / (1.f + exp_of(-x)); }
inline float relu(float x) { return x > 0.f ? x : x != x ? x : 0.f; }

void activate(float* x, int64_t n, Activation act) {
  switch (act) {
    case Activation::gelu: for (int64_t i = 0; i < n; ++i) x[i] = gelu(x[i]); break;
    case Activation::gelu_tanh: for (int64_t i = 0; i < n; ++i) x[i] = gelu_tanh(x[i]); break;
    case Activation::relu: for (int64_t i = 0; i < n; ++i) x[i] = relu(x[i]); break;
    case Activation::silu: for (int64_t i = 0; i < n; ++i) x[i] = silu(x[i]); break;
  }
}

void gate(float* y, const float* g, const float* up, int64_t n, Activation act) {
  for (int64_t i = 0; i < n; ++i) y[i] = g[i];
  activate(y, n, act);
  for (int64_t i = 0; i < n; ++i) y[i] *= up[i];
}

// ---- norms and attention -------------------------------------------------------------------------------------------------

inline float sum_of(const float* x, int64_t n) {
  V acc = S::zero();
  int64_t i = 0;
  for (; i + S::width <= n; i += S::width) acc = S::add(acc, load(x + i));
  return S::sum(S::add(acc, load_part(x + i, n - i)));
}

// sum of (x - mean)^2
inline float sum_of_squares(const float* x, float mean, int64_t n) {
  V acc = S::zero();
  const V m = S::set(mean);
  int64_t i = 0;
  for (; i + S::width <= n; i += S::width) {
    const V d = S::sub(load(x + i), m);
    acc = S::fma(d, d, acc);
  }
  float rest = 0;
  for (; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return S::sum(acc) + rest;
}

void norm(float* y, const float* x, const float* weight, const float* bias, NormKind kind, float eps, int n) {
  const float mean = kind == NormKind::layer ? sum_of(x, n) / float(n) : 0.f;
  const float scale = 1.f / __builtin_sqrtf(sum_of_squares(x, mean, n) / float(n) + eps);
  for (int i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i];
  if (bias)
    for (int i = 0; i < n; ++i) y[i] += bias[i];
}

void attend(const AttendArgs& a, float* scores) {
  const int d = a.head_dim, n = a.last - a.first + 1;
  float top = -__builtin_inff();
  for (int p = a.first; p <= a.last;) {  // runs of positions within one page
    const int in_page = p % kPageTokens;
    const int run = kPageTokens - in_page < a.last + 1 - p ? kPageTokens - in_page : a.last + 1 - p;
    const float* k = a.k + a.pages[p / kPageTokens] * a.page_stride + int64_t(in_page) * d;
    int j = 0;
    float s[4][1];
    for (; j + 4 <= run; j += 4) {
      tile<4, 1>(k + int64_t(j) * d, size_t(d) * sizeof(float), a.q, d, d, s);
      for (int i = 0; i < 4; ++i) scores[p - a.first + j + i] = s[i][0] * a.scale;
    }
    for (; j < run; ++j) {
      tile<1, 1>(k + int64_t(j) * d, size_t(d) * sizeof(float), a.q, d, d, s);
      scores[p - a.first + j] = s[0][0] * a.scale;
    }
    p += run;
  }
  for (int j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  for (int j = 0; j < n; ++j) scores[j] = exp_of(scores[j] - top);
  const float scale = 1.f / sum_of(scores, n);
  for (int i = 0; i < d; ++i) a.out[i] = 0.f;
  for (int p = a.first; p <= a.last; ++p) {
    const float* v = a.v + a.pages[p / kPageTokens] * a.page_stride + int64_t(p % kPageTokens) * d;
    const float w = scores[p - a.first] * scale;
    for (int i = 0; i < d; ++i) a.out[i] += w * v[i];
  }
}

const Kernels kTable = {S::name, matmul, attend, activate, gate, norm};
