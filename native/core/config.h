// What a model is, as data. Read from config.json of a weights directory (written by tools/convert.py).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace codefuse {

enum class NormKind { layer, rms };
enum class ResidualKind {
  serial,              // x += attn(norm1(x)); x += mlp(norm2(x))
  parallel_one_norm,   // n = norm1(x); x += attn(n) + mlp(n)
  parallel_two_norms,  // x += attn(norm1(x)) + mlp(norm2(x))
};
enum class Activation { gelu, gelu_tanh, relu, silu };  // gelu: erf form (hidden_act "gelu")
enum class PositionKind { rope, learned };

struct ModelConfig {
  std::string architecture;  // "gpt_neox"; informative, the fields below decide
  int vocab = 0;             // V
  int hidden = 0;            // H
  int layers = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;          // D
  int intermediate = 0;      // F
  int max_positions = 0;
  NormKind norm = NormKind::layer;
  float norm_eps = 1e-5f;
  ResidualKind residual = ResidualKind::serial;
  Activation activation = Activation::gelu;
  bool gated = false;        // act(gate(x)) * up(x)
  PositionKind position = PositionKind::rope;
  int rope_dim = 0;          // rotated leading dimensions of a head, even, <= D
  float rope_theta = 10000.f;
  float rope_scale = 1.f;    // linear scaling: positions are divided by it
  bool tied = false;         // the LM head is the embedding
  int window = 0;            // sliding attention window in tokens, 0: none
  int bos_id = -1;           // -1: none
  std::vector<int> eos_ids;

  int qkv_rows() const { return (heads + 2 * kv_heads) * head_dim; }
  bool two_norms() const { return residual != ResidualKind::parallel_one_norm; }
};

// Parses and validates; LoadError names the key, the value found and what was expected. path is for messages.
ModelConfig parse_model_config(const std::string& json_text, const std::string& path);

}  // namespace codefuse
