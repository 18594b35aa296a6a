// Weights made at load, for benchmarks of any size without a file: config.json has "random": {"seed": 0, "format": "f16"}.
#pragma once
#include <memory>
#include <optional>
#include <string>

#include "core/config.h"
#include "core/safetensors.h"
#include "formats/format.h"

namespace codefuse {

struct RandomSpec {
  uint64_t seed = 0;
  Format format = Format::f16;
};

// The "random" entry of a config.json, if there is one; LoadError names the key, the value found and what was expected.
std::optional<RandomSpec> parse_random_spec(const std::string& config_text, const std::string& path);

// Every tensor of the model, about N(0, 0.02), norm weights 1; with a quantized format the matrices, LM head included, are in it
// and the rest is f16. Tensors beyond the first 512 MB share memory, at varying
// offsets: more than any cache holds, and made in a fraction of a second.
std::unique_ptr<Weights> make_random_weights(const ModelConfig& config, const RandomSpec& spec, const std::string& directory);

}  // namespace codefuse
