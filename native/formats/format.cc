#include "formats/format.h"

#include <iterator>

namespace codefuse {

namespace {
constexpr Format kAll[] = {Format::f32, Format::f16, Format::bf16, Format::q8_row, Format::q4_g128, Format::q4_g64};
}  // namespace

const char* name_of(Format f) {
  switch (f) {
    case Format::f32: return "f32";
    case Format::f16: return "f16";
    case Format::bf16: return "bf16";
    case Format::q8_row: return "q8_row";
    case Format::q4_g128: return "q4_g128";
    case Format::q4_g64: return "q4_g64";
  }
  return "";
}

Format parse_format(const std::string& id) {
  std::string known;
  for (Format f : kAll) {
    if (id == name_of(f)) return f;
    known += cat(known.empty() ? "" : ", ", name_of(f));
  }
  throw ValueError(cat("format is '", id, "'; expected one of ", known));
}

std::string quantized_formats() {
  std::string all;
  for (Format f : kAll)
    if (is_quantized(f)) all += cat(all.empty() ? "" : f == *std::rbegin(kAll) ? " or " : ", ", name_of(f));
  return all;
}

HostMatrix HostMatrix::row_slice(int64_t begin, int64_t count) const {
  HostMatrix m = *this;
  m.data += size_t(begin) * stride;
  if (scale.data) m.scale.data = scale.row(begin);
  if (zero.data) m.zero.data = zero.row(begin);
  m.rows = count;
  return m;
}

HostMatrix HostMatrix::col_slice(int64_t begin, int64_t count) const {
  const int64_t unit = column_unit(format);
  if (begin % unit || count % unit)
    throw ValueError(cat("columns ", begin, " to ", begin + count, " of a matrix in ", name_of(format), "; expected multiples of ", unit));
  HostMatrix m = *this;
  m.data += row_bytes(format, begin);
  if (group_cols(format)) {
    m.scale.data += scale_bytes(format, begin);
    m.zero.data += zero_bytes(format, begin);
  }
  m.cols = count;
  return m;
}

void decode_row(const HostMatrix& m, int64_t r, float* out) {
  const uint8_t* row = m.data + size_t(r) * m.stride;
  switch (m.format) {
    case Format::f32: std::memcpy(out, row, size_t(m.cols) * 4); break;
    case Format::f16:
    case Format::bf16:
      for (int64_t i = 0; i < m.cols; ++i) {
        uint16_t h;
        std::memcpy(&h, row + 2 * i, 2);
        out[i] = m.format == Format::f16 ? f16_to_f32(h) : bf16_to_f32(h);
      }
      break;
    case Format::q8_row: {
      float scale;
      std::memcpy(&scale, m.scale.row(r), 4);
      for (int64_t i = 0; i < m.cols; ++i) out[i] = float(int8_t(row[i])) * scale;
      break;
    }
    case Format::q4_g128:
    case Format::q4_g64: {
      const int64_t group = group_cols(m.format), half = group / 2;
      for (int64_t g = 0; g < m.cols / group; ++g, row += half, out += group) {
        uint16_t h;
        std::memcpy(&h, m.scale.row(r) + 2 * g, 2);
        const float scale = f16_to_f32(h);
        const int zero = m.zero.row(r)[g];
        for (int64_t i = 0; i < half; ++i) {
          out[i] = float((row[i] & 15) - zero) * scale;
          out[i + half] = float((row[i] >> 4) - zero) * scale;
        }
      }
      break;
    }
  }
}

void pack_row(Format f, const uint8_t* codes, int64_t k, uint8_t* out) {
  if (f == Format::q8_row) {
    for (int64_t i = 0; i < k; ++i)
      if (codes[i] == 0x80) throw ValueError("a code of q8_row is -128; expected -127 to 127");
    std::memcpy(out, codes, size_t(k));
    return;
  }
  const int64_t group = group_cols(f), half = group / 2;
  if (!group) throw ValueError(cat("format is ", name_of(f), "; expected ", quantized_formats()));
  if (k % group) throw ValueError(cat("a row has ", k, " columns; expected a multiple of ", group, " in ", name_of(f)));
  for (int64_t i = 0; i < k; ++i)
    if (codes[i] > 15) throw ValueError(cat("a code of ", name_of(f), " is ", int(codes[i]), "; expected 0 to 15"));
  for (; k > 0; k -= group, codes += group)
    for (int64_t i = 0; i < half; ++i) *out++ = uint8_t(codes[i] | codes[i + half] << 4);
}

void unpack_row(Format f, const uint8_t* packed, int64_t k, uint8_t* codes) {
  if (f == Format::q8_row) {
    std::memcpy(codes, packed, size_t(k));
    return;
  }
  const int64_t group = group_cols(f), half = group / 2;
  if (!group || k % group) throw ValueError(cat("cannot unpack ", k, " columns of ", name_of(f)));
  for (; k > 0; k -= group, codes += group)
    for (int64_t i = 0; i < half; ++i, ++packed) {
      codes[i] = *packed & 15;
      codes[i + half] = *packed >> 4;
    }
}

void unpack_words(const uint32_t* words, int64_t n, bool interleaved, uint8_t* codes) {
  constexpr int kPlain[8] = {0, 1, 2, 3, 4, 5, 6, 7}, kInterleaved[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  const int* const place = interleaved ? kInterleaved : kPlain;
  for (int64_t w = 0; w < n; ++w)
    for (int i = 0; i < 8; ++i) codes[8 * w + place[i]] = uint8_t(words[w] >> 4 * i & 15);
}

}  // namespace codefuse
