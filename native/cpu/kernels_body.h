// Bodies of cpu/kernels.h over a struct S of the instruction set (see kernels_generic.cc): V, width, rows, tokens (a register
// tile of the matrix product), zero, set, load of float, F16, BF16 and I8, fma, add, sub, sum, and sum4, which adds in
// the order of sum. Included once per instruction
// set, inside its namespace; no standard library templates, whose copies the linker would share between instruction sets.

using V = S::V;

struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };
struct I8 { int8_t code; };

inline V load(const float* p) { return S::load(p); }
inline V load(const F16* p) { return S::load_f16(reinterpret_cast<const uint16_t*>(p)); }
inline V load(const BF16* p) { return S::load_bf16(reinterpret_cast<const uint16_t*>(p)); }
inline V load(const I8* p) { return S::load_i8(reinterpret_cast<const int8_t*>(p)); }

// The first n < width elements, then zeros.
template <class E>
inline V load_part(const E* p, int64_t n) {
  E part[S::width] = {};
  __builtin_memcpy(part, p, size_t(n) * sizeof(E));
  return load(part);
}

// ---- matrix product --------------------------------------------------------------------------------------------------

// out[m][r] = w[r] . x[m]: one vector accumulator each, lane l takes elements l, l + width, ...; the same for every R and M.
// Prefetch: brings the weights kAhead bytes further into the second-level cache; several short rows at once are too many
// streams for the processor to foresee (measured: 10 -> 50 GB/s).
constexpr int kAhead = 32768;

template <int R, int M, bool Prefetch, class E>
inline void tile(const E* w, size_t w_stride /*bytes*/, const float* x, int64_t x_stride, int64_t k_size, float out[M][R]) {
  const E* row[R];
  for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const E*>(reinterpret_cast<const char*>(w) + r * w_stride);
  V acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = S::zero();
  int64_t k = 0;
  for (; k + S::width <= k_size; k += S::width) {
    V wv[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      wv[r] = load(row[r] + k);
      if constexpr (Prefetch) __builtin_prefetch(reinterpret_cast<const char*>(row[r] + k) + kAhead, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V xv = load(x + m * x_stride + k);
#pragma GCC unroll 8
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
  if constexpr (R % 4 == 0) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int r = 0; r < R; r += 4) S::sum4(acc[r][m], acc[r + 1][m], acc[r + 2][m], acc[r + 3][m], &out[m][r]);
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) out[m][r] = S::sum(acc[r][m]);
  }
}

// Outputs [n, n + R) of tokens [t, t + M); w points at row n.
template <int R, int M, bool Prefetch, class E>
inline void finish_tile(const MatmulArgs& a, const E* w, int64_t n, int64_t t) {
  float out[M][R];
  tile<R, M, Prefetch>(w, a.w.stride, a.x + t * a.w.cols, a.w.cols, a.w.cols, out);
  for (int m = 0; m < M; ++m) {
    float* y = a.y + (t + m) * a.w.rows + n;
    for (int r = 0; r < R; ++r) {
      float v = out[m][r];
      if constexpr (sizeof(E) == 1) {
        float scale;
        __builtin_memcpy(&scale, a.w.scale.row(n + r), sizeof scale);
        v *= scale;
      }
      if (a.bias) v += a.bias[n + r];
      y[r] = a.accumulate ? y[r] + v : v;
    }
  }
}

template <class E>
inline const E* at_row(const E* w, size_t w_stride, int64_t r) {
  return reinterpret_cast<const E*>(reinterpret_cast<const char*>(w) + size_t(r) * w_stride);
}

// Outputs [begin, end) of tokens [t, t + M).
template <int M, bool Prefetch, class E>
inline void tokens(const MatmulArgs& a, const E* w, int64_t begin, int64_t end, int64_t t) {
  constexpr int R = S::rows;
  int64_t n = begin;
  if constexpr (M <= 2)  // more rows at once: enough independent sums to hide an addition's latency
    for (; n + 8 <= end; n += 8) finish_tile<8, M, Prefetch>(a, at_row(w, a.w.stride, n), n, t);
  for (; n + R <= end; n += R) finish_tile<R, M, Prefetch>(a, at_row(w, a.w.stride, n), n, t);
  for (; n < end; ++n) finish_tile<1, M, false>(a, at_row(w, a.w.stride, n), n, t);
}

template <class E>
void matmul_rows(const MatmulArgs& a, int64_t begin, int64_t end) {
  const E* w = reinterpret_cast<const E*>(a.w.data);
  for (int64_t n = begin; n < end; n += kBlockRows) {  // a block of weights stays in the cache for all tokens
    const int64_t stop = n + kBlockRows < end ? n + kBlockRows : end;
    if (a.tokens == 1) return tokens<1, true>(a, w, begin, end, 0);
    int64_t t = 0;  // the first tile of tokens fetches ahead, the others find the weights
    if (a.tokens >= S::tokens) {
      tokens<S::tokens, true>(a, w, n, stop, t), t += S::tokens;
    } else {
      tokens<2, true>(a, w, n, stop, t), t += 2;
    }
    for (; t + S::tokens <= a.tokens; t += S::tokens) tokens<S::tokens, false>(a, w, n, stop, t);
    if constexpr (S::tokens > 4)
      for (; t + 4 <= a.tokens; t += 4) tokens<4, false>(a, w, n, stop, t);
    for (; t + 2 <= a.tokens; t += 2) tokens<2, false>(a, w, n, stop, t);
    for (; t < a.tokens; ++t) tokens<1, false>(a, w, n, stop, t);
  }
}

#include "cpu/quantized_body.h"

void activate(float* x, int64_t n, Activation act);

void matmul(const MatmulArgs& a, int64_t begin, int64_t end) {
  switch (a.w.format) {
    case Format::f32: matmul_rows<float>(a, begin, end); break;
    case Format::f16: matmul_rows<F16>(a, begin, end); break;
    case Format::bf16: matmul_rows<BF16>(a, begin, end); break;
    case Format::q8_row: matmul_rows<I8>(a, begin, end); break;
    case Format::q4_g128: matmul4<128>(a, begin, end); break;
    case Format::q4_g64: matmul4<64>(a, begin, end); break;
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
  float part[256];  // y may be g or up
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t count = n - i < 256 ? n - i : 256;
    __builtin_memcpy(part, g + i, size_t(count) * sizeof(float));
    activate(part, count, act);
    for (int64_t j = 0; j < count; ++j) y[i + j] = part[j] * up[i + j];
  }
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

// Keys or values of one page, from position p on; the next page, which lies elsewhere, is fetched meanwhile if asked for.
inline const float* page_at(const AttendArgs& a, const float* base, int p) {
  const int page = p / kPageTokens;
  if (a.fetch && (page + 1) * kPageTokens <= a.last) {
    const char* next = reinterpret_cast<const char*>(base + a.pages[page + 1] * a.page_stride);
    for (int i = 0; i < kPageTokens * a.head_dim * int(sizeof(float)); i += 64) __builtin_prefetch(next + i, 0, 2);
  }
  return base + a.pages[page] * a.page_stride + int64_t(p % kPageTokens) * a.head_dim;
}

// End of the run of positions from p on that lie in its page.
inline int run_end(const AttendArgs& a, int p) {
  const int end = (p / kPageTokens + 1) * kPageTokens;
  return end <= a.last ? end : a.last + 1;
}

// scores[p - first] = scale * (q . k)
inline void score_keys(const AttendArgs& a, float* scores) {
  const int d = a.head_dim;
  const size_t stride = size_t(d) * sizeof(float);
  for (int p = a.first; p <= a.last;) {
    const float* k = page_at(a, a.k, p);
    const int end = run_end(a, p);
    float s[1][8], one[1][1];
    for (; p + 8 <= end; p += 8, k += 8 * d) {
      tile<8, 1, false>(k, stride, a.q, d, d, s);
      for (int i = 0; i < 8; ++i) scores[p - a.first + i] = s[0][i] * a.scale;
    }
    for (; p < end; ++p, k += d) {
      tile<1, 1, false>(k, stride, a.q, d, d, one);
      scores[p - a.first] = one[0][0] * a.scale;
    }
  }
}

// out[i .. i + C width) = scale * sum over positions of score * value
template <int C>
inline void weigh_values(const AttendArgs& a, const float* scores, float scale, int i) {
  V acc[C];
  for (int c = 0; c < C; ++c) acc[c] = S::zero();
  for (int p = a.first; p <= a.last;) {
    const float* v = page_at(a, a.v, p) + i;
    for (const int end = run_end(a, p); p < end; ++p, v += a.head_dim) {
      const V w = S::set(scores[p - a.first]);
      for (int c = 0; c < C; ++c) acc[c] = S::fma(w, load(v + c * S::width), acc[c]);
    }
  }
  for (int c = 0; c < C; ++c) S::store(a.out + i + c * S::width, S::fma(S::set(scale), acc[c], S::zero()));
}

void attend(const AttendArgs& a, float* scores) {
  const int d = a.head_dim, n = a.last - a.first + 1;
  score_keys(a, scores);
  float top = -__builtin_inff();
  for (int j = 0; j < n; ++j) top = scores[j] > top ? scores[j] : top;
  for (int j = 0; j < n; ++j) scores[j] = exp_of(scores[j] - top);
  const float scale = 1.f / sum_of(scores, n);
  int i = 0;
  for (; i + 4 * S::width <= d; i += 4 * S::width) weigh_values<4>(a, scores, scale, i);
  for (; i + S::width <= d; i += S::width) weigh_values<1>(a, scores, scale, i);
  for (; i < d; ++i) {
    float sum = 0;
    for (int p = a.first; p <= a.last; ++p)
      sum += scores[p - a.first] * a.v[a.pages[p / kPageTokens] * a.page_stride + int64_t(p % kPageTokens) * d + i];
    a.out[i] = sum * scale;
  }
}

// ---- sampling ----------------------------------------------------------------------------------------------------------

void order_keys(uint32_t* key, const float* logits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) key[i] = rule::order_key(logits[i]);
}

void weigh(float* d, float* w, const float* logits, float top, float temperature, int64_t n) {
  for (int64_t i = 0; i < n; ++i) d[i] = rule::div(rule::add(logits[i], -top), temperature);
  for (int64_t i = 0; i < n; ++i) w[i] = rule::exp_of(d[i]);
}

void noise(float* out, uint64_t seed, int32_t position, int32_t first_group, int32_t groups) {
  uint32_t words[256];
  for (int32_t g = 0; g < groups; g += 64, out += 256) {
    const int32_t some = groups - g < 64 ? groups - g : 64;
    for (int32_t i = 0; i < some; ++i) {
      const uint32_t counter[4] = {uint32_t(first_group + g + i), uint32_t(position), 0, 0};
      rule::philox(counter, seed, words + 4 * i);
    }
    for (int32_t i = 0; i < 4 * some; ++i) out[i] = rule::gumbel_of(words[i]);
  }
}

double sum_exp(const float* logits, float top, int64_t n) {
  float part[256];
  double sum = 0;
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t count = n - i < 256 ? n - i : 256;
    for (int64_t j = 0; j < count; ++j) part[j] = exp_of(logits[i + j] - top);
    sum += double(sum_of(part, count));
  }
  return sum;
}

const Kernels kTable = {S::name, matmul, attend, activate, gate, norm, order_keys, weigh, noise, sum_exp};
