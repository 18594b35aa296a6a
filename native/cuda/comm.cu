#include "cuda/comm.h"

#include "ops/comm.h"

namespace codefuse::cuda {

namespace {

enum Meeting { shares_sent, sums_sent, columns_sent, kMeetings };
enum Counter { small_rounds, large_rounds, column_rounds, kCounters };

constexpr size_t kRoundsAt = size_t(kMeetings) * kLargeBlocks * kRanksMost * 4;
constexpr size_t kSmallAt = (kRoundsAt + size_t(kCounters) * kLargeBlocks * 4 + 255) / 256 * 256;
static_assert(kSmallBlocks <= kLargeBlocks, "rounds");

__host__ __device__ constexpr int share_floats(int world) { return (kLargeFloats / 4 / world + 1) * 4; }  // of a rank at most
__host__ __device__ constexpr int column_floats(int world) { return kLargeFloats / 4 / world * 4; }       // of a rank in one exchange
__host__ __device__ constexpr size_t shares_at(int world) { return kSmallAt + size_t(2) * world * kSmallFloats * 8; }
__host__ __device__ constexpr size_t sums_at(int world) { return shares_at(world) + size_t(world) * share_floats(world) * 4; }
__host__ __device__ constexpr size_t columns_at(int world) { return sums_at(world) + size_t(kLargeFloats) * 4; }

// The parts of a mailbox.
__device__ uint32_t* flag(char* box, Meeting of, int block, int rank) { return reinterpret_cast<uint32_t*>(box) + (of * kLargeBlocks + block) * kRanksMost + rank; }
__device__ uint32_t* rounds(char* box, Counter of, int block) { return reinterpret_cast<uint32_t*>(box + kRoundsAt) + of * kLargeBlocks + block; }
__device__ uint64_t* small(const Mail& m, int to, int from, uint32_t round) {
  return reinterpret_cast<uint64_t*>(m.box[to] + kSmallAt) + (int64_t(round & 1) * m.world + from) * kSmallFloats;
}
__device__ float* share(const Mail& m, int to, int from) { return reinterpret_cast<float*>(m.box[to] + shares_at(m.world)) + int64_t(from) * share_floats(m.world); }
__device__ float* sums(const Mail& m, int to) { return reinterpret_cast<float*>(m.box[to] + sums_at(m.world)); }
__device__ float* columns(const Mail& m, int to, int from, uint32_t round) {
  return reinterpret_cast<float*>(m.box[to] + columns_at(m.world)) + (int64_t(round & 1) * m.world + from) * column_floats(m.world);
}

// Never 0, which mailboxes begin with; odd and even alternate.
__device__ uint32_t after(uint32_t round) { return round == UINT32_MAX ? 2 : round + 1; }

__device__ uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

class Patience {
 public:
  __device__ bool over(const Mail& m) {
    if (++looks_ % 1024) return false;
    int32_t failed;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(failed) : "l"(m.failed) : "memory");
    if (failed) return true;
    const uint64_t now = now_ns();
    if (began_ == 0) began_ = now;
    if (now - began_ < kPatienceNs) return false;
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(m.failed), "r"(1 + m.rank) : "memory");
    return true;
  }

 private:
  uint32_t looks_ = 0;
  uint64_t began_ = 0;
};

// Two values; each comes with its round in one piece, so that no flag and no fence is needed.
__device__ void send(uint64_t* to, float2 v, uint32_t round) {
  const uint64_t high = uint64_t(round) << 32;
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(high | __float_as_uint(v.x)), "l"(high | __float_as_uint(v.y)) : "memory");
}
__device__ float2 receive(const Mail& m, const uint64_t* from, uint32_t round) {
  Patience patience;
  for (;;) {
    uint64_t a, b;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
    if (uint32_t(a >> 32) == round && uint32_t(b >> 32) == round) return make_float2(__uint_as_float(uint32_t(a)), __uint_as_float(uint32_t(b)));
    if (patience.over(m)) return make_float2(0.f, 0.f);
  }
}

// What this block has written anywhere is seen by the same block of the other ranks behind their meet(), and theirs here.
__device__ void meet(const Mail& m, Meeting of, uint32_t round) {
  __syncthreads();
  const int other = int(threadIdx.x);
  if (other < m.world && other != m.rank) {
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag(m.box[other], of, blockIdx.x, m.rank)), "r"(round) : "memory");
    const uint32_t* const theirs = flag(m.box[m.rank], of, blockIdx.x, other);
    Patience patience;
    for (;;) {
      uint32_t come;
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(come) : "l"(theirs) : "memory");
      if (int32_t(come - round) >= 0 || patience.over(m)) break;  // it may be a round ahead
    }
  }
  __syncthreads();
}

// A later round writes to the same half of a mailbox when the one between has ended, for which every rank had to be through this one.
__global__ void __launch_bounds__(kSmallThreads) add_sum_small(const __grid_constant__ Mail m, float* y, float* data, int n) {
  launch_dependents();
  grid_wait();
  uint32_t* const counter = rounds(m.box[m.rank], small_rounds, blockIdx.x);
  const uint32_t round = after(*counter);
  const auto index = [&](int p) { return ((p * kSmallBlocks + int(blockIdx.x)) * kSmallThreads + int(threadIdx.x)) * 2; };
  float2 own[kSmallPairs], sum_to[kSmallPairs];
#pragma unroll
  for (int p = 0; p < kSmallPairs; ++p) {
    const int i = index(p);
    if (i >= n) continue;
    const bool two = i + 1 < n;
    own[p] = make_float2(data[i], two ? data[i + 1] : 0.f);
    sum_to[p] = make_float2(y[i], two ? y[i + 1] : 0.f);
    for (int r = 0; r < m.world; ++r)
      if (r != m.rank) send(small(m, r, m.rank, round) + i, own[p], round);
    data[i] = 0.f;
    if (two) data[i + 1] = 0.f;
  }
#pragma unroll
  for (int p = 0; p < kSmallPairs; ++p) {
    const int i = index(p);
    if (i >= n) continue;
    float2 sum = make_float2(0.f, 0.f);
    for (int r = 0; r < m.world; ++r) {
      const float2 v = r == m.rank ? own[p] : receive(m, small(m, m.rank, r, round) + i, round);
      sum.x += v.x, sum.y += v.y;
    }
    y[i] = sum_to[p].x + sum.x;
    if (i + 1 < n) y[i + 1] = sum_to[p].y + sum.y;
  }
  __syncthreads();
  if (threadIdx.x == 0) *counter = round;
}

// Four floats from 4 i; what lies behind n is zero, or stays.
__device__ float4 load4(const float* x, int i, int n) {
  if (4 * i + 3 < n) return reinterpret_cast<const float4*>(x)[i];
  const auto at = [&](int j) { return 4 * i + j < n ? x[4 * i + j] : 0.f; };
  return make_float4(at(0), at(1), at(2), at(3));
}
__device__ void store4(float* x, int i, int n, float4 v) {
  if (4 * i + 3 < n) {
    reinterpret_cast<float4*>(x)[i] = v;
    return;
  }
  const float f[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (4 * i + j < n) x[4 * i + j] = f[j];
}
__device__ float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// This block's part of [first, first + count): so many of them in order.
struct Part {
  int begin, end;
  __device__ Part(int first, int count) {
    begin = first + int(int64_t(count) * blockIdx.x / kLargeBlocks) + int(threadIdx.x);
    end = first + int(int64_t(count) * (blockIdx.x + 1) / kLargeBlocks);
  }
};

// Every rank adds up its share of the elements and sends the sums to all. A mailbox is free when the launch before has ended here: nobody
// comes here before all have read what they got in that.
__global__ void __launch_bounds__(kLargeThreads) add_sum_large(const __grid_constant__ Mail m, float* y, float* data, int n) {
  launch_dependents();
  grid_wait();
  uint32_t* const counter = rounds(m.box[m.rank], large_rounds, blockIdx.x);
  const uint32_t round = after(*counter);
  const int quads = (n + 3) / 4;
  const auto begin = [&](int r) { return int(share_begin(quads, r, m.world)); };
  const auto part = [&](int r) { return Part(begin(r), begin(r + 1) - begin(r)); };
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int r = 0; r < m.world; ++r) {
    if (r == m.rank) continue;
    float4* const to = reinterpret_cast<float4*>(share(m, r, m.rank)) - begin(r);
    const Part p = part(r);
    for (int i = p.begin; i < p.end; i += kLargeThreads) {
      to[i] = load4(data, i, n);
      store4(data, i, n, zero);
    }
  }
  meet(m, shares_sent, round);
  const Part mine = part(m.rank);
  for (int i = mine.begin; i < mine.end; i += kLargeThreads) {
    float4 sum = zero;
    for (int r = 0; r < m.world; ++r)
      sum = plus(sum, r == m.rank ? load4(data, i, n) : __ldcg(reinterpret_cast<const float4*>(share(m, m.rank, r)) + i - begin(m.rank)));
    for (int r = 0; r < m.world; ++r)
      if (r != m.rank) reinterpret_cast<float4*>(sums(m, r))[i] = sum;
    store4(y, i, n, plus(load4(y, i, n), sum));
    store4(data, i, n, zero);
  }
  meet(m, sums_sent, round);
  for (int r = 0; r < m.world; ++r) {
    if (r == m.rank) continue;
    const Part p = part(r);
    for (int i = p.begin; i < p.end; i += kLargeThreads) store4(y, i, n, plus(load4(y, i, n), __ldcg(reinterpret_cast<const float4*>(sums(m, m.rank)) + i)));
  }
  if (threadIdx.x == 0) *counter = round;
}

// Elements [begin, begin + column_floats) of every rank's in, row by row.
__global__ void __launch_bounds__(kLargeThreads) gather_piece(const __grid_constant__ Mail m, float* out, const float* in, int rows, int total, int begin) {
  launch_dependents();
  grid_wait();
  uint32_t* const counter = rounds(m.box[m.rank], column_rounds, blockIdx.x);
  const uint32_t round = after(*counter);
  const auto first = [&](int r) { return int(share_begin(total, r, m.world)); };
  const auto count = [&](int r) { return first(r + 1) - first(r); };
  const auto length = [&](int r) { return max(0, min(column_floats(m.world), rows * count(r) - begin)); };
  const auto put = [&](int r, int i, float4 v) {
    const float f[4] = {v.x, v.y, v.z, v.w};
    const int n = length(r), columns = count(r);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = begin + 4 * i + j;
      if (4 * i + j < n) out[int64_t(at / columns) * total + first(r) + at % columns] = f[j];
    }
  };
  const Part mine(0, (length(m.rank) + 3) / 4);
  for (int i = mine.begin; i < mine.end; i += kLargeThreads) {
    const float4 v = load4(in + begin, i, length(m.rank));
    for (int r = 0; r < m.world; ++r)
      if (r != m.rank) reinterpret_cast<float4*>(columns(m, r, m.rank, round))[i] = v;
    put(m.rank, i, v);
  }
  meet(m, columns_sent, round);
  for (int r = 0; r < m.world; ++r) {
    if (r == m.rank) continue;
    const Part p(0, (length(r) + 3) / 4);
    for (int i = p.begin; i < p.end; i += kLargeThreads) put(r, i, __ldcg(reinterpret_cast<const float4*>(columns(m, m.rank, r, round)) + i));
  }
  if (threadIdx.x == 0) *counter = round;
}

}  // namespace

size_t mailbox_bytes(int world) { return columns_at(world) + size_t(2) * world * column_floats(world) * 4; }

void add_sum(const Stream& s, const Mail& m, float* y, float* data, int64_t n) {
  if (n <= kSmallFloats) {
    if (n > 0) launch(s, add_sum_small, kSmallBlocks, kSmallThreads, 0, m, y, data, int(n));
    return;
  }
  for (int64_t i = 0; i < n; i += kLargeFloats) launch(s, add_sum_large, kLargeBlocks, kLargeThreads, 0, m, y + i, data + i, int(std::min<int64_t>(kLargeFloats, n - i)));
}

void gather_columns(const Stream& s, const Mail& m, float* out, const float* in, int64_t rows, int64_t total) {
  int64_t most = 0;
  for (int r = 0; r < m.world; ++r) most = std::max(most, rows * (share_begin(total, r + 1, m.world) - share_begin(total, r, m.world)));
  for (int64_t i = 0; i < most; i += column_floats(m.world)) launch(s, gather_piece, kLargeBlocks, kLargeThreads, 0, m, out, in, int(rows), int(total), int(i));
}

}  // namespace codefuse::cuda
