// Attention of single rows on the tensor cores (16 bits, head_dim 64 or 128). A row's positions, in splits of 64 aligned at 0, are shared by
// up to kMostSegments blocks, each with splits that follow one another; a warp has the same quarter of every split of its block, 16
// tokens at a time, and goes through them by itself: its scores, its greatest score so far, its sums. Warps are added up in order,
// then blocks (attention_parts.cuh). How a row is divided depends on its position and on the device, not on what else the step has.
//
// A warp's K and V pass through a ring of its own, K of 16 tokens and V of 16 tokens by turns, filled by asynchronous copies: with what earlier
// steps stored before the kernel waits for its predecessor. K is the A operand of mma.m16n8k16 (tokens x heads), V transposed that of
// the second product (head_dim x heads), so up to 8 heads of Q that share K and V cost what one does.
// With rope (FUSE) a row comes as the projection left it: a block rotates its Q, and the warp that has the row's own position rotates K, stores K
// and V, and goes on with them from registers; no other row of the step may look at that position.
#include <algorithm>

#include "cuda/attention_parts.cuh"
#include "cuda/rotate.cuh"

namespace codefuse::cuda {

namespace {

constexpr int kWarps = 4, kTokens = 16, kHeads = 8;  // of a block; of a warp at a time; of Q in a block
constexpr int kMostSegments = 32;
static_assert(kWarps * kTokens == kSplitTokens && kPageTokens % kTokens == 0, "");

constexpr int slot_bytes(int head_dim) { return kTokens * head_dim * 2; }
template <int D> constexpr int kSlotBytes = slot_bytes(D);
constexpr int shared_bytes(int head_dim, int slots) { return kWarps * slots * slot_bytes(head_dim) + kHeads * (head_dim + 8) * 2; }
constexpr int kSystemShared = 1024 + 256;  // of a block, the system's and static
// Of a warp's ring. Beside weights a copy takes its time: as many as have room, where one row's blocks are no more than multiprocessors.
constexpr int kSlots = 3, kMoreSlots = 5, kMostSlots = 6;

// 8x8 of 16 bits, transposed: from (row lane / 4, columns 2 (lane % 4) ..) of a to the same of its transpose
__device__ __forceinline__ uint32_t transposed(uint32_t a) {
  uint32_t v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(a));
  return v;
}

// Waits for the rows that qkv holds; all threads of the block.
__device__ __forceinline__ void wait_for(const Ready& ready) {
  if (!ready.counter) return grid_wait();
  if (threadIdx.x == 0) {
    int32_t stored = 0;
    while (true) {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(stored) : "l"(ready.counter) : "memory");
      if (stored >= ready.expected) break;
      __nanosleep(32);
    }
  }
  __syncthreads();
}

// grid (kv_heads x ceil(group / kHeads), rows, segments)
template <class T, int D, bool FUSE, int SLOTS>
__global__ void __launch_bounds__(kWarps * 32, 4) attend(T* __restrict__ out, const T* __restrict__ qkv, T* keys, T* values, const DecodeAttention a) {
  constexpr int kUnits = D / 8, kRow = D * 2;  // of 16 bytes, of a token; bytes of a token
  constexpr int kQStride = D + 8;
  extern __shared__ __align__(256) uint8_t shared[];
  launch_dependents();
  const int group = a.heads / a.kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int row = a.row0 + blockIdx.y, kv_head = blockIdx.x / parts, head0 = kv_head * group + blockIdx.x % parts * kHeads;
  const int heads = min(kHeads, group - int(blockIdx.x) % parts * kHeads);
  const int last = a.m.position[row], first = a.window > 0 ? max(0, last - a.window + 1) : 0;
  const int first_split = first / kSplitTokens, splits = last / kSplitTokens - first_split + 1;
  const int each = (splits + gridDim.z - 1) / gridDim.z, segments = (splits + each - 1) / each;
  const bool is_first = blockIdx.x + blockIdx.y + blockIdx.z == 0;
  const auto leave = [&] {  // a block of this kernel waits, so it ends after its predecessors
    if (is_first) grid_wait();
  };
  if (int(blockIdx.z) >= segments || a.m.slot[row] < 0) return leave();
  const int settled = a.m.settled ? a.m.settled[row] : 0, stored = FUSE ? last : last + 1;  // end of what is read from pages
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int32_t* table = a.m.table + int64_t(a.m.sequence[row]) * a.m.max_pages;
  qkv += int64_t(row) * (a.heads + 2 * a.kv_heads) * D;
  out += (int64_t(row) * a.heads + head0) * D;

  // the warp's slices, a quarter of a split each
  const int token0 = (first_split + blockIdx.z * each) * kSplitTokens + warp * kTokens;  // of the first
  const int ends = min(last + 1, (first_split + min(splits, int(blockIdx.z + 1) * each)) * kSplitTokens);
  const int slices = token0 < ends ? (ends - token0 + kSplitTokens - 1) / kSplitTokens : 0;
  const uint32_t ring = shared_address(shared) + warp * SLOTS * kSlotBytes<D>;
  // unit u of a token lies at u ^ (token % 8), so that eight tokens' are in different banks. What is constant of u and token can be exclusive-ored
  // into the address: rows are as long as the units are many.
  const auto place = [&](int token, int unit) { return ring + token * kRow + ((unit ^ (token & 7)) * 16); };
  int pages = 0, issued = 0, slot_in = 0, slot = 0;  // pages: lane i has that of slice i, of each 32 slices
  const uint64_t policy = once_policy();
  // the next of K, V, K, V ...; behind the last one nothing
  const uint32_t copy_to = place(lane / kUnits, lane % kUnits);
  const auto fetch = [&] {
    const int slice = issued / 2, from = token0 + slice * kSplitTokens;
    if (slice < slices) {
      if (issued % 64 == 0) {
        const int mine = from + lane * kSplitTokens;
        pages = mine < ends ? table[mine / kPageTokens] : 0;
      }
      const int page = __shfl_sync(~0u, pages, slice % 32);
      const T* base = (issued % 2 ? values : keys) + ((int64_t(page) * a.kv_heads + kv_head) * kPageTokens + from % kPageTokens) * D + lane * 8;
      const uint32_t to = copy_to + slot_in * kSlotBytes<D>;
      const auto copy = [&](int i, int bytes) {  // of 32 / kUnits tokens
        const uint32_t at = (to ^ (i * 32 / kUnits % 8 * 16)) + i * 512;
        if constexpr (SLOTS > kSlots)  // one row: no other reads these pages
          copy16_once(at, base + i * 256, bytes, policy);
        else
          copy16(at, base + i * 256, bytes);
      };
      constexpr int kCopies = kTokens * kUnits / 32;
      if (from >= first && from + kTokens <= stored) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) copy(i, 16);
      } else {
#pragma unroll 1
        for (int i = 0; i < kCopies; ++i) {
          const int token = from + i * 32 / kUnits + lane / kUnits;
          if (!FUSE || token != last) copy(i, token >= first && token < stored ? 16 : 0);
        }
      }
    }
    copy_commit();
    ++issued;
    if (++slot_in == SLOTS) slot_in = 0;
  };
  const auto is_settled = [&](int slice) { return min(token0 + slice * kSplitTokens + kTokens, stored) <= settled; };
#pragma unroll 1
  while (issued < SLOTS && is_settled(issued / 2)) fetch();

  float2 angle[8];
  const int at = lane % kUnits * 8, pairs = a.rope_dim / 2, partner = at < pairs ? at + pairs : at - pairs;
  if (FUSE && at < a.rope_dim) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float4 two = __ldg(reinterpret_cast<const float4*>(a.angles + int64_t(last) * pairs + min(at, partner) + i));
      angle[i] = make_float2(two.x, two.y), angle[i + 1] = make_float2(two.z, two.w);
    }
  }
  // elements at .. at + 7 of a head of Q or K, rotated
  const auto turned = [&](const T* head) {
    Eight<T> own = load8(head + at);
    if constexpr (FUSE) {
      if (at < a.rope_dim) {
        float x[8], y[8];
        unpack(load8(head + partner), y);
        unpack(own, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = at < pairs ? rotate_first(x[i], y[i], angle[i]) : rotate_second(y[i], x[i], angle[i]);
        own.raw[0] = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
      }
    }
    return own;
  };
  wait_for(a.ready);
#pragma unroll 1
  while (issued < SLOTS) fetch();

  // Q [head][kQStride], then the B operand of the first product: head g's elements 16 i + 2 t, + 1 and + 8, + 9
  T* const q_at = reinterpret_cast<T*>(shared + kWarps * SLOTS * kSlotBytes<D>);
  for (int h = threadIdx.x / kUnits; h < heads; h += kWarps * 32 / kUnits)
    *reinterpret_cast<uint4*>(q_at + h * kQStride + at) = turned(qkv + int64_t(head0 + h) * D).raw[0];
  const int own_slice = (last - token0) / kSplitTokens;
  const bool owns = FUSE && token0 <= last && last < ends && last - token0 - own_slice * kSplitTokens < kTokens;  // the row's own position
  uint4 own_k{}, own_v{};
  if (owns) {
    own_k = turned(qkv + int64_t(a.heads + kv_head) * D).raw[0];
    own_v = load8(qkv + int64_t(a.heads + a.kv_heads + kv_head) * D + at).raw[0];
    if (lane < kUnits && blockIdx.x % parts == 0) {
      const int64_t to = ((int64_t(table[last / kPageTokens]) * a.kv_heads + kv_head) * kPageTokens + last % kPageTokens) * D + at;
      *reinterpret_cast<uint4*>(keys + to) = own_k;
      *reinterpret_cast<uint4*>(values + to) = own_v;
    }
  }
  __syncthreads();
  uint32_t q[D / 16][2];
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) q[i][j] = g < heads ? *reinterpret_cast<const uint32_t*>(q_at + g * kQStride + i * 16 + j * 8 + 2 * t) : 0u;

  // the oldest fetch is there, with the row's own K or V
  const auto take = [&](int slice, const uint4& own) {
    copy_wait<SLOTS - 1>();
    if (owns && slice == own_slice && lane < kUnits)
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(place(last % kTokens, lane) + slot * kSlotBytes<D>), "r"(own.x), "r"(own.y), "r"(own.z), "r"(own.w) : "memory");
    __syncwarp();
  };
  const auto give_back = [&] {
    __syncwarp();
    if (++slot == SLOTS) slot = 0;
    fetch();
  };
  const uint32_t k_at = place(lane % 16, lane / 16), v_at = place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  float acc[D / 16][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of head_dim 16 i + g and + 8, heads 2 t and + 1; of those heads
  for (int slice = 0; slice < slices; ++slice) {
    take(slice, own_k);
    float s[2][4] = {};  // tokens g and g + 8, heads 2 t and + 1
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t k[4];
      ldmatrix4(k, (k_at + slot * kSlotBytes<D>) ^ (i * 32));
      mma16816<T>(s[i % 2], k[0], k[1], k[2], k[3], q[i][0], q[i][1]);
    }
    give_back();
    float p[4];
    const int token = token0 + slice * kSplitTokens + g;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int position = token + e / 2 * 8;
      p[e] = position >= first && position <= last ? (s[0][e] + s[1][e]) * a.scale : -INFINITY;
    }
    float before[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(p[h], p[2 + h]);
#pragma unroll
      for (int o = 4; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
      top = fmaxf(top, most[h]);
      const float base = top == -INFINITY ? 0.f : top;  // nothing seen yet
      before[h] = exp2f(most[h] - base);
      most[h] = top;
      p[h] = exp2f(p[h] - base), p[2 + h] = exp2f(p[2 + h] - base);
      total[h] = fmaf(total[h], before[h], p[h] + p[2 + h]);
    }
    if (__any_sync(~0u, before[0] != 1.f || before[1] != 1.f))
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][e] *= before[e % 2];
    const uint32_t b0 = transposed(pack2<T>(p[0], p[1])), b1 = transposed(pack2<T>(p[2], p[3]));
    take(slice, own_v);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t v[4];
      ldmatrix4_trans(v, (v_at + slot * kSlotBytes<D>) ^ (i * 32));
      mma16816<T>(acc[i], v[0], v[1], v[2], v[3], b0, b1);
    }
    give_back();
  }
  copy_wait_all();
  __syncwarp();

  // [warp][head][D + 2] in the rings
  float* const sums = reinterpret_cast<float*>(shared);
  constexpr int kSums = SLOTS * kSlotBytes<D> / 4;  // of a warp
  static_assert(kHeads * (D + 2) <= kSums, "");
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int o = 4; o < 32; o *= 2) total[h] += __shfl_xor_sync(~0u, total[h], o);
    if (2 * t + h >= heads) continue;
    float* const to = sums + warp * kSums + (2 * t + h) * (D + 2);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) to[i * 16 + g] = acc[i][h], to[i * 16 + g + 8] = acc[i][2 + h];
    if (g == 0) to[D] = most[h], to[D + 1] = total[h];
  }
  __syncthreads();
  float* const partial = a.partial + (int64_t(blockIdx.y) * a.heads + head0) * a.splits * (D + 2);
  for (int i = threadIdx.x; i < heads * D; i += kWarps * 32) {
    const int h = i / D, e = i % D;
    const float* from = sums + h * (D + 2);
    float top = from[D], sum = 0.f, all = 0.f;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, from[w * kSums + D]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float scale = exp2f(from[w * kSums + D] - top);  // 0 for a warp without tokens
      sum = fmaf(scale, from[w * kSums + e], sum);
      all = fmaf(scale, from[w * kSums + D + 1], all);
    }
    if (segments == 1) {
      out[i] = from_float<T>(sum / all);
    } else {
      float* to = partial + (int64_t(h) * a.splits + blockIdx.z) * (D + 2);
      __stcg(to + e, sum);
      if (e == 0) __stcg(reinterpret_cast<float2*>(to + D), make_float2(top, all));
    }
  }
  if (segments > 1 && is_last_of(a.arrived + blockIdx.y * gridDim.x + blockIdx.x, segments)) add_parts(out, partial, heads, D, a.splits, segments);
  leave();
}

template <class T>
void run(const Stream& s, void* out, const void* qkv, const KvLayer& kv, DecodeAttention a, int rows, int rows_at_once, bool fuse) {
  const bool wide = a.head_dim == 128;
  auto kernel = wide ? (fuse ? attend<T, 128, true, kSlots> : attend<T, 128, false, kSlots>) : (fuse ? attend<T, 64, true, kSlots> : attend<T, 64, false, kSlots>);
  int shared = shared_bytes(a.head_dim, kSlots);
  const auto with = [&](auto slots) {
    constexpr int kOf = decltype(slots)::value;
    if (!fuse || rows > 1 || a.ready.room < shared_bytes(a.head_dim, kOf) + kSystemShared) return;
    kernel = wide ? attend<T, 128, true, kOf> : attend<T, 64, true, kOf>;
    shared = shared_bytes(a.head_dim, kOf);
  };
  with(std::integral_constant<int, kMoreSlots>());
  with(std::integral_constant<int, kMostSlots>());
  const int group = a.heads / a.kv_heads, across = a.kv_heads * ((group + kHeads - 1) / kHeads);
  const int segments = std::max(1, std::min({kMostSegments, a.splits, s.sms / across}));
  for (int row = 0; row < rows; row += rows_at_once, a.row0 += rows_at_once) {
    launch(s, kernel, dim3(across, std::min(rows_at_once, rows - row), segments), kWarps * 32, shared, static_cast<T*>(out), static_cast<const T*>(qkv),
           static_cast<T*>(kv.k), static_cast<T*>(kv.v), a);
    a.ready = {};  // the next launch has the scratch of this one, and so waits for its end
  }
}

}  // namespace

bool attention_mma_fits(DType act, int head_dim) { return act != DType::f32 && (head_dim == 64 || head_dim == 128); }
int rope_attention_shared(const AttentionShape& a, bool one) { return shared_bytes(a.head_dim, one ? kMoreSlots : kSlots) + kSystemShared; }

void attention_mma(const Stream& s, DType act, void* out, const void* qkv, const KvLayer& kv, const DecodeAttention& a, int rows, int rows_at_once, bool fuse) {
  act == DType::f16 ? run<__half>(s, out, qkv, kv, a, rows, rows_at_once, fuse) : run<__nv_bfloat16>(s, out, qkv, kv, a, rows, rows_at_once, fuse);
}

}  // namespace codefuse::cuda
