// Weight formats: the only place that knows a weight's bit layout. A format id is the same string in the file, here and
// on the command line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace codefuse {

enum class Format : uint8_t { f32, f16, bf16 };

inline const char* name_of(Format f) { return f == Format::f32 ? "f32" : f == Format::f16 ? "f16" : "bf16"; }
Format parse_format(const std::string& id);  // ValueError lists the known ids

// Bytes of one row of k elements.
inline size_t row_bytes(Format f, int64_t k) { return size_t(k) * (f == Format::f32 ? 4 : 2); }

// A matrix in host memory (usually inside an mmap) in its canonical layout: rows of k contiguous elements.
struct HostMatrix {
  Format format = Format::f32;
  int64_t rows = 0, cols = 0;   // [out, in]
  const uint8_t* data = nullptr;
  size_t stride = 0;            // bytes from one row to the next (a rank's slice of columns keeps the whole row's stride)

  bool empty() const { return data == nullptr; }
  HostMatrix row_slice(int64_t begin, int64_t count) const;  // rows [begin, begin + count)
  HostMatrix col_slice(int64_t begin, int64_t count) const;  // columns [begin, begin + count)
};

// out[0..cols): row r as float32. The reference of every device decode.
void decode_row(const HostMatrix& m, int64_t r, float* out);

}  // namespace codefuse
