#include <pybind11/stl.h>

#include <cstring>

#include "bind_testing.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

template <class T>
T field(const py::dict& d, const char* key, T otherwise) {
  return d.contains(key) ? d[key].cast<T>() : otherwise;
}

}  // namespace

Batch to_batch(const py::dict& d) {
  Batch b;
  b.decode_rows = field(d, "decode_rows", 0);
  b.token = field<std::vector<int32_t>>(d, "token", {});
  b.slot = field<std::vector<int32_t>>(d, "slot", {});
  b.position = field<std::vector<int32_t>>(d, "position", {});
  for (auto& c : field<std::vector<std::array<int, 4>>>(d, "chunks", {})) b.chunks.push_back({c[0], c[1], c[2], c[3]});
  b.logit_row = field<std::vector<int32_t>>(d, "logit_row", {});
  b.sample.resize(b.logit_row.size());
  const auto params = field<std::vector<py::dict>>(d, "sample", {});
  for (size_t i = 0; i < std::min(params.size(), b.sample.size()); ++i)
    b.sample[i] = {field(params[i], "temperature", 0.f), field(params[i], "top_k", 0), field(params[i], "top_p", 1.f),
                   field(params[i], "min_p", 0.f), field<uint64_t>(params[i], "seed", 0), field(params[i], "top_tokens", 0),
                   field(params[i], "top_edited", false)};
  b.edit_begin = field<std::vector<int32_t>>(d, "edit_begin", {});
  for (auto& [token, add, penalty] : field<std::vector<std::tuple<int32_t, float, float>>>(d, "edits", {})) b.edits.push_back({token, add, penalty});
  b.mask_of = field<std::vector<int32_t>>(d, "mask_of", {});
  b.masks = field<std::vector<uint32_t>>(d, "masks", {});
  for (auto& c : field<std::vector<std::array<int32_t, 3>>>(d, "copies", {})) b.copies.push_back({c[0], c[1], c[2]});
  b.table_slot = field<std::vector<int32_t>>(d, "table_slot", {});
  b.table = field<std::vector<int32_t>>(d, "table", {});
  return b;
}

Activation parse_activation(const std::string& s) {
  if (s == "gelu") return Activation::gelu;
  if (s == "gelu_tanh") return Activation::gelu_tanh;
  if (s == "relu") return Activation::relu;
  if (s == "silu") return Activation::silu;
  throw ValueError(cat("activation is '", s, "'; expected gelu, gelu_tanh, relu or silu"));
}

NormKind parse_norm(const std::string& s) {
  if (s == "layer") return NormKind::layer;
  if (s == "rms") return NormKind::rms;
  throw ValueError(cat("norm is '", s, "'; expected layer or rms"));
}

std::string packed(const Floats& a, DType t) {
  std::string out(size_t(a.size()) * size_of(t), '\0');
  if (t == DType::f32) {
    std::memcpy(out.data(), a.data(), out.size());
  } else if (t == DType::f16) {
    py::array half = a.attr("astype")("float16");
    std::memcpy(out.data(), half.data(), out.size());
  } else {
    for (py::ssize_t i = 0; i < a.size(); ++i) {  // to the nearest, ties to even
      uint32_t u;
      std::memcpy(&u, a.data() + i, 4);
      u = (u & 0x7fffffffu) > 0x7f800000u ? u | 0x00400000u : u + 0x7fff + (u >> 16 & 1);
      const uint16_t h = uint16_t(u >> 16);
      std::memcpy(out.data() + 2 * i, &h, 2);
    }
  }
  return out;
}
