// Element types of activations, KV cache and unquantized weights, and their exact host conversions.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "core/check.h"

namespace codefuse {

enum class DType : uint8_t { f32, f16, bf16 };

inline size_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// "float32" | "float16" | "bfloat16": the names of config.json, the command line and Python.
inline const char* name_of(DType t) { return t == DType::f32 ? "float32" : t == DType::f16 ? "float16" : "bfloat16"; }

inline DType parse_dtype(const std::string& s) {
  if (s == "float32") return DType::f32;
  if (s == "float16") return DType::f16;
  if (s == "bfloat16") return DType::bf16;
  throw ValueError(cat("dtype is '", s, "'; expected float32, float16 or bfloat16"));
}

inline float bf16_to_f32(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float f16_to_f32(uint16_t h) {
  // IEEE 754 binary16: subnormals are h * 2^-24
  uint32_t sign = uint32_t(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023, u;
  float f;
  if (exp == 0) {
    f = float(man) * 5.9604644775390625e-08f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  } else {
    u = sign | ((exp == 31 ? 255u : exp + 112) << 23) | (man << 13);
  }
  std::memcpy(&f, &u, 4);
  return f;
}

}  // namespace codefuse
