// Hopper's warpgroup matrix instructions (sm_90a): 16-bit operands, float32 sums. B lies in shared memory, A there or in registers.
// Tiles in shared memory are rows of 128 bytes with the 128-byte swizzle of tensor_map.h, aligned at 1024 bytes.
#pragma once
#include "cuda/device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CODEFUSE_WGMMA 1

namespace codefuse::cuda {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// keeps the compiler from moving what uses the sums across
template <int N> __device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a tile whose rows run along K: 64 columns of K, 8 rows to a block of 1024 bytes. 16 columns further is + 2.
__device__ __forceinline__ uint64_t wgmma_rows(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// Descriptor of a B whose rows run along N: a row is one of K and has 64 columns of N; the next 64 columns are a tile `next` bytes
// further. 16 of K further is + 128.
__device__ __forceinline__ uint64_t wgmma_columns(uint32_t address, uint32_t next) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// d [64, N] (each warp of the warpgroup its 16 rows; of those a lane 4 g + t has in d[4 j + q] row g + 8 (q / 2), column 8 j + 2 t + q % 2)
// = A [64, 16] B [16, N], + d if ADD.
#define CODEFUSE_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CODEFUSE_D32(i) CODEFUSE_D8(i), CODEFUSE_D8(i + 8), CODEFUSE_D8(i + 16), CODEFUSE_D8(i + 24)
#define CODEFUSE_LIST32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CODEFUSE_LIST64 CODEFUSE_LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CODEFUSE_LIST96 CODEFUSE_LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define CODEFUSE_LIST128 CODEFUSE_LIST96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define CODEFUSE_WGMMA_OP(n, type, list, operands, add, last) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" list "}, " operands ", p, 1, 1, " last ";\n}"

// A by rows (wgmma_rows) and B by rows
#define CODEFUSE_WGMMA_ROWS(n, list, operands, add, ...)                                                                                       \
  template <class T, bool ADD>                                                                                                                \
  __device__ __forceinline__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b) {                                                            \
    if constexpr (std::is_same<T, __half>::value)                                                                                             \
      asm volatile(CODEFUSE_WGMMA_OP(n, f16, list, operands, add, "0, 0") : __VA_ARGS__ : "l"(a), "l"(b), "n"(int(ADD)) : "memory");           \
    else                                                                                                                                      \
      asm volatile(CODEFUSE_WGMMA_OP(n, bf16, list, operands, add, "0, 0") : __VA_ARGS__ : "l"(a), "l"(b), "n"(int(ADD)) : "memory");          \
  }
// A in registers (as mma16816's), B by columns (wgmma_columns)
#define CODEFUSE_WGMMA_COLUMNS(n, list, operands, add, ...)                                                                                    \
  template <class T, bool ADD>                                                                                                                \
  __device__ __forceinline__ void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b) {                                               \
    if constexpr (std::is_same<T, __half>::value)                                                                                             \
      asm volatile(CODEFUSE_WGMMA_OP(n, f16, list, operands, add, "1") : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)) : "memory");  \
    else                                                                                                                                      \
      asm volatile(CODEFUSE_WGMMA_OP(n, bf16, list, operands, add, "1") : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ADD)) : "memory"); \
  }
CODEFUSE_WGMMA_ROWS(128, CODEFUSE_LIST64, "%64, %65", "%66", CODEFUSE_D32(0), CODEFUSE_D32(32))
CODEFUSE_WGMMA_COLUMNS(64, CODEFUSE_LIST32, "{%32,%33,%34,%35}, %36", "%37", CODEFUSE_D32(0))
CODEFUSE_WGMMA_COLUMNS(128, CODEFUSE_LIST64, "{%64,%65,%66,%67}, %68", "%69", CODEFUSE_D32(0), CODEFUSE_D32(32))

// d += A B, A in registers, B by rows
#define CODEFUSE_WGMMA_ADD(n, list, a, b, ...)                                                                                                  \
  template <class T>                                                                                                                          \
  __device__ __forceinline__ void wgmma_add(float (&d)[n / 2], const uint4& w, uint64_t x) {                                                    \
    if constexpr (std::is_same<T, __half>::value)                                                                                             \
      asm volatile(CODEFUSE_WGMMA_OP(n, f16, list, "{" a "}, " b, "1", "0") : __VA_ARGS__ : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x));                   \
    else                                                                                                                                      \
      asm volatile(CODEFUSE_WGMMA_OP(n, bf16, list, "{" a "}, " b, "1", "0") : __VA_ARGS__ : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(x));                  \
  }
CODEFUSE_WGMMA_ADD(64, CODEFUSE_LIST32, "%32,%33,%34,%35", "%36", CODEFUSE_D32(0))
CODEFUSE_WGMMA_ADD(128, CODEFUSE_LIST64, "%64,%65,%66,%67", "%68", CODEFUSE_D32(0), CODEFUSE_D32(32))
CODEFUSE_WGMMA_ADD(256, CODEFUSE_LIST128, "%128,%129,%130,%131", "%132", CODEFUSE_D32(0), CODEFUSE_D32(32), CODEFUSE_D32(64), CODEFUSE_D32(96))
#undef CODEFUSE_D8
#undef CODEFUSE_D32
#undef CODEFUSE_LIST32
#undef CODEFUSE_LIST64
#undef CODEFUSE_LIST96
#undef CODEFUSE_LIST128
#undef CODEFUSE_WGMMA_OP
#undef CODEFUSE_WGMMA_ROWS
#undef CODEFUSE_WGMMA_COLUMNS
#undef CODEFUSE_WGMMA_ADD

}  // namespace codefuse::cuda
#endif
