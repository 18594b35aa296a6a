// _native.pack, unpack and decode: a quantizer's choices <-> the canonical layout (formats/format.h); xxh3_64.
#include "bind_formats.h"

#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "core/check.h"
#include "core/xxh3.h"
#include "model/random_weights.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

using Parts = py::typing::Dict<py::str, py::array>;
using Shape = std::vector<py::ssize_t>;

std::string shown(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += cat(i ? ", " : "", shape[i]);
  return s + "]";
}

// The bytes of a contiguous array of that type ('i', 'u' or 'f', and bytes) and shape.
const uint8_t* data_of(const char* name, const py::array& a, char kind, py::ssize_t size, const Shape& shape) {
  const Shape found(a.shape(), a.shape() + a.ndim());
  if (a.dtype().kind() != kind || a.itemsize() != size || found != shape || !(a.flags() & py::array::c_style))
    throw ValueError(cat(name, ": expected a contiguous array ", shown(shape), " of ", kind == 'i' ? "int" : kind == 'u' ? "uint" : "float", 8 * size,
                         ", found ", shown(found), " of ", std::string(py::str(a.dtype()))));
  return static_cast<const uint8_t*>(a.data());
}

Format quantized(const std::string& id) {
  const Format f = parse_format(id);
  if (!is_quantized(f)) throw ValueError(cat("format is '", id, "'; expected ", quantized_formats()));
  return f;
}

Shape two(const char* name, const py::array& a) {
  if (a.ndim() != 2) throw ValueError(cat(name, " has ", a.ndim(), " dimensions; expected 2"));
  return {a.shape(0), a.shape(1)};
}

void check_columns(Format f, int64_t k) {
  if (k % column_unit(f)) throw ValueError(cat("a matrix has ", k, " columns; expected a multiple of ", column_unit(f), " in ", name_of(f)));
}

// Scales and zeros of n rows of k columns; refuses those that mean nothing.
void set_scales(HostMatrix& m, const py::array& scale, const std::optional<py::array>& zero) {
  const bool q4 = group_cols(m.format) > 0;
  const py::ssize_t n = m.rows, groups = q4 ? m.cols / group_cols(m.format) : 0;
  const py::ssize_t count = q4 ? n * groups : n;
  m.scale = {q4 ? data_of("scale", scale, 'f', 2, {n, groups}) : data_of("scale", scale, 'f', 4, {n}), scale_bytes(m.format, m.cols)};
  for (py::ssize_t i = 0; i < count; ++i) {
    float s;
    uint16_t h;
    if (q4)
      std::memcpy(&h, m.scale.data + 2 * i, 2), s = f16_to_f32(h);
    else
      std::memcpy(&s, m.scale.data + 4 * i, 4);
    if (!(s >= 0) || !std::isfinite(s)) throw ValueError(cat("scale holds ", s, "; expected finite numbers, 0 or more"));
  }
  if (q4 != zero.has_value()) throw ValueError(cat("zero", q4 ? " is missing; " : ": ", name_of(m.format), " has ", q4 ? "one per group" : "none"));
  if (!q4) return;
  m.zero = {data_of("zero", *zero, 'u', 1, {n, groups}), zero_bytes(m.format, m.cols)};
  const int greatest = count ? *std::max_element(m.zero.data, m.zero.data + count) : 0;
  if (greatest > 15) throw ValueError(cat("zero holds ", greatest, "; expected 0 to 15"));
}

Parts pack(const std::string& format, const py::array& codes, const py::array& scale, const std::optional<py::array>& zero) {
  HostMatrix m;
  m.format = quantized(format);
  const bool q8 = m.format == Format::q8_row;
  const Shape shape = two("codes", codes);
  m.rows = shape[0];
  m.cols = shape[1];
  const uint8_t* from = data_of("codes", codes, q8 ? 'i' : 'u', 1, shape);
  check_columns(m.format, m.cols);
  set_scales(m, scale, zero);
  const size_t row = row_bytes(m.format, m.cols);
  py::array packed(py::dtype(q8 ? "int8" : "uint8"), Shape{shape[0], py::ssize_t(row)});
  auto* to = static_cast<uint8_t*>(packed.mutable_data());
  for (int64_t r = 0; r < m.rows; ++r) pack_row(m.format, from + r * m.cols, m.cols, to + size_t(r) * row);
  Parts parts;
  parts["weight"] = packed;
  parts["scale"] = scale;
  if (zero) parts["zero"] = *zero;
  return parts;
}

py::array unpack(const std::string& format, const Parts& parts) {
  const HostMatrix m = host_matrix(name_of(quantized(format)), parts);
  py::array codes(py::dtype(m.format == Format::q8_row ? "int8" : "uint8"), Shape{py::ssize_t(m.rows), py::ssize_t(m.cols)});
  auto* to = static_cast<uint8_t*>(codes.mutable_data());
  for (int64_t r = 0; r < m.rows; ++r) unpack_row(m.format, m.data + size_t(r) * m.stride, m.cols, to + r * m.cols);
  return codes;
}

py::array unpack_words_of(const py::array& words, bool interleaved) {
  const Shape shape = two("words", words);
  const uint8_t* from = data_of("words", words, 'i', 4, shape);
  py::array codes(py::dtype("uint8"), Shape{shape[0], 8 * shape[1]});
  unpack_words(reinterpret_cast<const uint32_t*>(from), int64_t(shape[0]) * shape[1], interleaved, static_cast<uint8_t*>(codes.mutable_data()));
  return codes;
}

py::array_t<float> decode(const std::string& format, const py::object& weight) {
  const HostMatrix m = host_matrix(format, weight);
  py::array_t<float> out(Shape{py::ssize_t(m.rows), py::ssize_t(m.cols)});
  for (int64_t r = 0; r < m.rows; ++r) decode_row(m, r, out.mutable_data() + r * m.cols);
  return out;
}

uint64_t checksum(const py::array& data) {
  if (!(data.flags() & py::array::c_style)) throw ValueError("data: expected a contiguous array");
  const void* const bytes = data.data();
  const size_t size = size_t(data.nbytes());
  py::gil_scoped_release unlocked;
  return xxh3_64(bytes, size);
}

using RandomTensor = py::typing::Tuple<py::str, py::str, py::typing::List<py::int_>, py::array_t<uint8_t>>;

py::typing::Dict<py::str, RandomTensor> random_tensors(const std::string& config) {
  const std::string path = "config";
  const std::optional<RandomSpec> spec = parse_random_spec(config, path);
  if (!spec) throw ValueError("config has no \"random\"; expected one with a seed and a format");
  std::shared_ptr<Weights> weights;
  {
    py::gil_scoped_release unlocked;
    weights = make_random_weights(parse_model_config(config, path), *spec, path);
  }
  const py::capsule owner(new std::shared_ptr<Weights>(weights), [](void* p) { delete static_cast<std::shared_ptr<Weights>*>(p); });
  py::typing::Dict<py::str, RandomTensor> tensors;
  for (const auto& [name, t] : weights->tensors())
    tensors[py::str(name)] = py::make_tuple(name_of(t.element), t.format, py::cast(t.shape), py::array_t<uint8_t>(py::ssize_t(bytes_of(t)), t.data, owner));
  return tensors;
}

}  // namespace

HostMatrix host_matrix(const std::string& format, const py::object& weight) {
  HostMatrix m;
  m.format = parse_format(format);
  py::array a;
  if (!is_quantized(m.format)) {
    a = weight.cast<py::array>();
    m.cols = two("weight", a)[1];
    if (size_t(a.itemsize()) != row_bytes(m.format, 1) || !(a.flags() & py::array::c_style))
      throw ValueError(cat("weight: expected a contiguous array of ", row_bytes(m.format, 1), "-byte elements"));
    m.rows = a.shape(0);
  } else {
    const auto parts = weight.cast<py::dict>();
    a = parts["weight"].cast<py::array>();
    const bool q8 = m.format == Format::q8_row;
    const Shape shape = two("weight", a);
    data_of("weight", a, q8 ? 'i' : 'u', 1, shape);
    m.rows = shape[0];
    m.cols = shape[1] * (q8 ? 1 : 2);
    check_columns(m.format, m.cols);
    std::optional<py::array> zero;
    if (parts.contains("zero")) zero = parts["zero"].cast<py::array>();
    set_scales(m, parts["scale"].cast<py::array>(), zero);
  }
  m.stride = row_bytes(m.format, m.cols);
  m.data = static_cast<const uint8_t*>(a.data());
  return m;
}

void bind_formats(py::module_& m) {
  m.def("pack", &pack, py::arg("format"), py::arg("codes"), py::arg("scale"), py::arg("zero") = py::none(),
        "The tensors of a quantized matrix, as they are stored: weight, scale and in 4 bits zero. codes [N, K]: int8 -127..127 with float32 "
        "scale [N] (q8_row), uint8 0..15 with float16 scale and uint8 zero [N, K / 128] (q4_g128) or [N, K / 64] (q4_g64).");
  m.def("unpack", &unpack, py::arg("format"), py::arg("parts"), "The codes that pack took.");
  m.def("unpack_words", &unpack_words_of, py::arg("words"), py::arg("interleaved"),
        "The 4-bit codes in int32 words [R, C] of a GPTQ or (interleaved) AWQ checkpoint: uint8 [R, 8 C].");
  m.def("random_tensors", &random_tensors, py::arg("config"),
        "The tensors that a config.json with \"random\" stands for: name -> (element type as in safetensors files, format id or \"\", shape, bytes). "
        "The bytes are views of memory that tensors share; they are not to be written.");
  m.def("xxh3_64", &checksum, py::arg("data"), "XXH3 (64 bits) of a contiguous array's bytes: the checksums of config.json. Runs without the GIL.");
  m.def("decode", &decode, py::arg("format"), py::arg("weight"), "The values as float32; weight as pack returns it, or an array of plain elements.");
}
