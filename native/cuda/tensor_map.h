// Tensor maps of rows x [T, K]; what is outside x reads as zeros.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "core/dtype.h"
#include "cuda/device.cuh"

namespace codefuse::cuda {

inline CUtensorMap map_of(CUtensorMapDataType type, const void* x, int T, int K, int box_columns, int box_rows, CUtensorMapSwizzle swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // through the runtime: the module does not link libcuda
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found), "finding cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found), "finding cuTensorMapEncodeTiled");
#endif
    if (!f || found != cudaDriverEntryPointSuccess) throw DeviceError("CUDA: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(f);
  }();
  CUtensorMap map;
  const cuuint64_t size[2] = {cuuint64_t(K), cuuint64_t(T)}, stride[1] = {cuuint64_t(K) * (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2)};
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, step[2] = {1, 1};
  const CUresult r = encode(&map, type, 2, const_cast<void*>(x), size, stride,
                            box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw DeviceError(cat("CUDA: cuTensorMapEncodeTiled of [", T, ", ", K, "]: error ", int(r)));
  return map;
}
inline CUtensorMapDataType map_type(DType act) { return act == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; }
// Of 16-bit elements: boxes of 64 columns x box_rows rows, swizzled by 128 bytes in shared memory: 16-byte unit u of row r lies at unit u ^ r % 8.
inline CUtensorMap rows_map(DType act, const void* x, int T, int K, int box_rows) { return map_of(map_type(act), x, T, K, 64, box_rows, CU_TENSOR_MAP_SWIZZLE_128B); }
// Pieces of `columns` of a single row.
inline CUtensorMap row_map(DType act, const void* x, int K, int columns) { return map_of(map_type(act), x, 1, K, columns, 1, CU_TENSOR_MAP_SWIZZLE_NONE); }

}  // namespace codefuse::cuda
