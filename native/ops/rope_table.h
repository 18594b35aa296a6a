// Angles of the rotary position embedding, computed on the host at load; every device rotates by the same table.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/config.h"

namespace codefuse {

struct RopeTable {
  std::vector<float> cos, sin;  // [positions, rope_dim / 2]
};

// Angle of pair i at position p: p * (theta^(-2i / rope_dim) / scale), the frequency and the product rounded to float32 as the
// models were trained; cosine and sine exact to float32.
inline RopeTable make_rope_table(const ModelConfig& c, int positions) {
  const int pairs = c.position == PositionKind::rope ? c.rope_dim / 2 : 0;
  RopeTable t;
  t.cos.resize(size_t(positions) * pairs);
  t.sin.resize(size_t(positions) * pairs);
  for (int i = 0; i < pairs; ++i) {
    const float inverse = float(1.0 / std::pow(double(c.rope_theta), 2.0 * i / c.rope_dim)) / c.rope_scale;
    for (int p = 0; p < positions; ++p) {
      const double angle = float(p) * inverse;
      t.cos[size_t(p) * pairs + i] = float(std::cos(angle));
      t.sin[size_t(p) * pairs + i] = float(std::sin(angle));
    }
  }
  return t;
}

}  // namespace codefuse
