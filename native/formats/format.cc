#include "formats/format.h"

namespace codefuse {

Format parse_format(const std::string& id) {
  for (Format f : {Format::f32, Format::f16, Format::bf16})
    if (id == name_of(f)) return f;
  throw ValueError(cat("format is '", id, "'; expected f32, f16 or bf16"));
}

HostMatrix HostMatrix::row_slice(int64_t begin, int64_t count) const {
  HostMatrix m = *this;
  m.data += size_t(begin) * stride;
  m.rows = count;
  return m;
}

HostMatrix HostMatrix::col_slice(int64_t begin, int64_t count) const {
  HostMatrix m = *this;
  m.data += row_bytes(format, begin);
  m.cols = count;
  return m;
}

void decode_row(const HostMatrix& m, int64_t r, float* out) {
  const uint8_t* row = m.data + size_t(r) * m.stride;
  for (int64_t i = 0; i < m.cols; ++i) {
    if (m.format == Format::f32) {
      std::memcpy(out + i, row + 4 * i, 4);
    } else {
      uint16_t h;
      std::memcpy(&h, row + 2 * i, 2);
      out[i] = m.format == Format::f16 ? f16_to_f32(h) : bf16_to_f32(h);
    }
  }
}

}  // namespace codefuse
