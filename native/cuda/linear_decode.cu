// Linear layers of decode rows: as fast as the weights can be read. One block per multiprocessor streams its equal share of the
// matrix's chunks (tiles.cuh) through a ring in shared memory, with each chunk the rows' 64 activations. The weights are the A
// operand of the tensor cores and the rows its columns, 8 at a time, so one row costs what eight do, and an output's
// order of summation is the same for 1 row and for 64: along K inside a share, then share by share in order.
// On Hopper the ring is filled with weights before the kernel waits for its predecessor.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/tiles.cuh"

namespace codefuse::cuda {

namespace {

constexpr int kWarps = 8;                   // consumers, 32 rows of a chunk each
constexpr int kXStride = kChunkCols * 2 + 16;  // bytes between rows of x in shared memory: 16-byte reads without bank conflicts
[[maybe_unused]] constexpr int kMaxStages = 8;

struct Args {
  const uint8_t* w;
  const uint8_t* x;  // [T, K]
  int T, N, steps;   // steps: chunks of a row group
  int chunks;        // of the matrix
  int stages;
  SplitScratch scratch;
  Epilogue epilogue;
};

__device__ __forceinline__ int share_begin(const Args& a, int block) { return int(int64_t(a.chunks) * block / gridDim.x); }
// the block whose share has chunk c
__device__ __forceinline__ int owner(const Args& a, int c) { return int((int64_t(c + 1) * gridDim.x - 1) / a.chunks); }
// a share is part of at most two split groups: its first and another one
__device__ __forceinline__ float* partial_of(const Args& a, int block, int group) {
  int part = 2 * block + (share_begin(a, block) / a.steps == group ? 0 : 1);
  return a.scratch.partial + int64_t(part) * kDecodeRows * kGroupRows;
}

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Outputs of a row group over columns [first, last] of its chunks are in acc.
template <class T, int NG>
__device__ __forceinline__ void finish(const Args& a, float (&acc)[2][NG][4], int group, bool whole) {
  __shared__ int is_last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* partial = whole ? nullptr : partial_of(a, blockIdx.x, group);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < NG; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        int row = warp * 32 + i * 16 + g + (q / 2) * 8, token = j * 8 + 2 * t + q % 2, n = group * kGroupRows + row;
        if (token < a.T) {
          if (!whole)
            __stcg(partial + token * kGroupRows + row, acc[i][j][q]);
          else if (n < a.N)
            store_output<T>(a.epilogue, acc[i][j][q], token, n, a.N);
        }
        acc[i][j][q] = 0.f;
      }
  if (whole) return;
  // the block that arrives last adds the parts, in the order of the shares
  const int first = owner(a, group * a.steps), parts = owner(a, group * a.steps + a.steps - 1) - first + 1;
  __threadfence();
  consumers_sync();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(a.scratch.arrived + group, 1) == parts - 1;
    if (is_last) a.scratch.arrived[group] = 0;
  }
  consumers_sync();
  if (!is_last) return;
  __threadfence();
  const int row = threadIdx.x, n = group * kGroupRows + row;
  for (int token = 0; token < a.T; ++token) {
    float z = 0.f;
#pragma unroll 4
    for (int p = 0; p < parts; ++p) z += __ldcg(partial_of(a, first + p, group) + token * kGroupRows + row);
    if (n < a.N) store_output<T>(a.epilogue, z, token, n, a.N);
  }
}

// One chunk: 8 warps x (2 row tiles) x NG groups of 8 rows of x x 4 steps.
template <class T, int NG>
__device__ __forceinline__ void multiply(float (&acc)[2][NG][4], const uint8_t* w, const uint8_t* x) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint4 a[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int s = 0; s < 4; ++s) a[i][s] = *reinterpret_cast<const uint4*>(w + (warp * 2 + i) * kRowTileBytes + s * 512 + lane * 16);
  x += (lane % 8) * kXStride + (lane / 8) * 16;
#pragma unroll
  for (int j = 0; j < NG; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[4];  // 8 rows x 32 columns of x
      ldmatrix4(b, x + j * 8 * kXStride + half * 64);
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4& w4 = a[i][2 * half + s];
          mma16816<T>(acc[i][j], w4.x, w4.y, w4.z, w4.w, b[2 * s], b[2 * s + 1]);
        }
    }
}

template <class T, int NG>
__global__ void __launch_bounds__(kWarps * 32 + 32, 1) stream_matrix(const Args a) {
  extern __shared__ __align__(128) uint8_t ring[];  // [stages] chunks, then [stages] x [8 NG, kXStride]
  uint8_t* const xs = ring + a.stages * kChunkBytes;
  constexpr int kXBytes = NG * 8 * kXStride;
  const int begin = share_begin(a, blockIdx.x), end = share_begin(a, blockIdx.x + 1);
  const size_t row_bytes = size_t(a.steps) * kChunkCols * 2;
  launch_dependents();
  float acc[2][NG][4] = {};
  int stage = 0, step = begin % a.steps, group = begin / a.steps, first_step = step;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ __align__(8) uint64_t full[kMaxStages], empty[kMaxStages];
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.stages; ++s) barrier_init(&full[s], 1), barrier_init(&empty[s], kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x / 32 == kWarps) {  // the producer
    auto fetch_weights = [&](int c, int s) {
      if (lane == 0) {
        barrier_expect(&full[s], kChunkBytes + a.T * kChunkCols * 2);
        bulk_copy(ring + s * kChunkBytes, a.w + size_t(c) * kChunkBytes, kChunkBytes, &full[s]);
      }
      __syncwarp();
    };
    auto fetch_x = [&](int c, int s) {
      for (int r = lane; r < a.T; r += 32)
        bulk_copy(xs + s * kXBytes + r * kXStride, a.x + r * row_bytes + (c % a.steps) * kChunkCols * 2, kChunkCols * 2, &full[s]);
    };
    const int filled = min(a.stages, end - begin);
    for (int s = 0; s < filled; ++s) fetch_weights(begin + s, s);
    grid_wait();
    for (int s = 0; s < filled; ++s) fetch_x(begin + s, s);
    uint32_t parity = 0;
    for (int c = begin + filled; c < end; ++c) {
      barrier_wait(&empty[stage], parity);
      fetch_weights(c, stage);
      fetch_x(c, stage);
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
    return;
  }
  grid_wait();
  uint32_t parity = 0;
  for (int c = begin; c < end; ++c) {
    barrier_wait(&full[stage], parity);
    multiply<T, NG>(acc, ring + stage * kChunkBytes, xs + stage * kXBytes);
    __syncwarp();
    if (lane == 0) barrier_arrive(&empty[stage]);
    if (++stage == a.stages) stage = 0, parity ^= 1;
    if (step == a.steps - 1 || c == end - 1) {
      finish<T, NG>(a, acc, group, first_step == 0 && step == a.steps - 1);
      step = first_step = 0, ++group;
    } else {
      ++step;
    }
  }
#else
  auto fetch = [&](int c, int s) {
    if (c < end) {
      for (int i = threadIdx.x; i < kChunkBytes / 16; i += kWarps * 32)
        copy16(ring + s * kChunkBytes + i * 16, a.w + size_t(c) * kChunkBytes + i * 16);
      for (int i = threadIdx.x; i < a.T * 8; i += kWarps * 32)
        copy16(xs + s * kXBytes + i / 8 * kXStride + i % 8 * 16, a.x + i / 8 * row_bytes + (c % a.steps) * kChunkCols * 2 + i % 8 * 16);
    }
    copy_commit();
  };
  for (int s = 0; s < a.stages - 1; ++s) fetch(begin + s, s);
  for (int c = begin; c < end; ++c) {
    switch (a.stages) {
      case 2: copy_wait<0>(); break;
      case 3: copy_wait<1>(); break;
      default: copy_wait<2>(); break;
    }
    __syncthreads();
    fetch(c + a.stages - 1, stage == 0 ? a.stages - 1 : stage - 1);
    multiply<T, NG>(acc, ring + stage * kChunkBytes, xs + stage * kXBytes);
    if (++stage == a.stages) stage = 0;
    if (step == a.steps - 1 || c == end - 1) {
      finish<T, NG>(a, acc, group, first_step == 0 && step == a.steps - 1);
      step = first_step = 0, ++group;
    } else {
      ++step;
    }
  }
#endif
}

template <class T, int NG>
void run(const Stream& s, Args& a) {
  const int stage_bytes = kChunkBytes + NG * 8 * kXStride;
  a.stages = std::min((s.shared_max - 1024) / stage_bytes, s.bulk_copy ? 6 : 4);
  if (a.stages < 2) throw DeviceError(cat("CUDA: this device's ", s.shared_max, " bytes of shared memory per block are too few"));
  launch(s, stream_matrix<T, NG>, std::min(s.sms, a.chunks), kWarps * 32 + (s.bulk_copy ? 32 : 0), size_t(a.stages) * stage_bytes, a);
}

template <class T>
void run(const Stream& s, Args& a) {
  switch ((a.T + 7) / 8) {
    case 1: return run<T, 1>(s, a);
    case 2: return run<T, 2>(s, a);
    case 3: return run<T, 3>(s, a);
    case 4: return run<T, 4>(s, a);
    case 5: return run<T, 5>(s, a);
    case 6: return run<T, 6>(s, a);
    case 7: return run<T, 7>(s, a);
    case 8: return run<T, 8>(s, a);
    default: throw DeviceError(cat("CUDA: decode_linear of ", a.T, " rows; at most ", kDecodeRows));
  }
}

}  // namespace

void decode_linear(const Stream& s, DType act, const void* x, const void* w, int T, int N, int K, const SplitScratch& scratch, const Epilogue& e) {
  Args a{};
  a.w = static_cast<const uint8_t*>(w);
  a.x = static_cast<const uint8_t*>(x);
  a.T = T;
  a.N = N;
  a.steps = int(steps_of(K));
  a.chunks = int(groups_of(N)) * a.steps;
  a.scratch = scratch;
  a.epilogue = e;
  act == DType::f16 ? run<__half>(s, a) : run<__nv_bfloat16>(s, a);
}

}  // namespace codefuse::cuda
