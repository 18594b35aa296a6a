// Weight formats: the only place that knows a weight's bit layout. A format id is the same string in the file, here and
// on the command line.
//
//   f32, f16, bf16   one element after the other
//   q8_row           int8 codes -127..127 and a float32 scale per row:       w = code * scale
//   q4_g128          4-bit codes, and for every 128 columns of a row ("group") a float16 scale and a zero 0..15:
//                    w = (code - zero) * scale. Byte i of a group's 64 has column i in its low half, column i + 64 in its high half.
//   q4_g64           the same, for every 64 columns: byte i of a group's 32 has columns i and i + 32
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace codefuse {

enum class Format : uint8_t { f32, f16, bf16, q8_row, q4_g128, q4_g64 };

// Columns that share a scale and a zero; 0 where there are no groups.
constexpr int64_t group_cols(Format f) { return f == Format::q4_g128 ? 128 : f == Format::q4_g64 ? 64 : 0; }

const char* name_of(Format f);
Format parse_format(const std::string& id);  // ValueError lists the known ids
std::string quantized_formats();             // "q8_row, q4_g128 or q4_g64", for messages
inline bool is_quantized(Format f) { return f == Format::q8_row || group_cols(f); }
// A row can be cut, and must end, at multiples of this many columns.
inline int64_t column_unit(Format f) { return group_cols(f) ? group_cols(f) : 1; }

// Bytes of the elements or codes of one row of k columns, of its scales, and of its zeros.
inline size_t row_bytes(Format f, int64_t k) {
  return f == Format::f32 ? size_t(k) * 4 : f == Format::q8_row ? size_t(k) : group_cols(f) ? size_t(k) / 2 : size_t(k) * 2;
}
inline size_t scale_bytes(Format f, int64_t k) { return f == Format::q8_row ? 4 : group_cols(f) ? size_t(k / group_cols(f)) * 2 : 0; }
inline size_t zero_bytes(Format f, int64_t k) { return group_cols(f) ? size_t(k / group_cols(f)) : 0; }

// A part of a matrix in host memory: so many bytes a row, one row every `stride` bytes.
struct HostRows {
  const uint8_t* data = nullptr;
  size_t stride = 0;  // (a rank's slice of columns keeps the whole row's stride)

  const uint8_t* row(int64_t r) const { return data + size_t(r) * stride; }
};

// A matrix in host memory (usually inside an mmap) in its canonical layout.
struct HostMatrix {
  Format format = Format::f32;
  int64_t rows = 0, cols = 0;   // [out, in]
  const uint8_t* data = nullptr;  // elements or codes, row_bytes() a row
  size_t stride = 0;            // bytes from one row to the next (a rank's slice of columns keeps the whole row's stride)
  HostRows scale, zero;         // quantized formats

  bool empty() const { return data == nullptr; }
  size_t bytes() const { return size_t(rows) * (row_bytes(format, cols) + scale_bytes(format, cols) + zero_bytes(format, cols)); }
  HostMatrix row_slice(int64_t begin, int64_t count) const;  // rows [begin, begin + count)
  HostMatrix col_slice(int64_t begin, int64_t count) const;  // columns [begin, begin + count), multiples of column_unit()
};

// out[0..cols): row r as float32. The reference of every device decode.
void decode_row(const HostMatrix& m, int64_t r, float* out);

// Codes as a quantizer chose them, one per byte (q8_row: int8) -> a row's row_bytes(), and back. ValueError for a code out of range.
void pack_row(Format f, const uint8_t* codes /*[k]*/, int64_t k, uint8_t* out);
void unpack_row(Format f, const uint8_t* packed, int64_t k, uint8_t* codes /*[k]*/);

// Eight 4-bit codes a word, the lowest bits first, as GPTQ and AWQ checkpoints store them. interleaved (AWQ): a word holds the codes in the
// order 0 2 4 6 1 3 5 7.
void unpack_words(const uint32_t* words, int64_t n, bool interleaved, uint8_t* codes /*[8 n]*/);

}  // namespace codefuse
