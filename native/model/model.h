// The transformer graph, written once over Ops and Comm: one rank's weights, buffers and forward pass.
#pragma once
#include <cstdint>
#include <vector>

#include "core/config.h"
#include "core/safetensors.h"
#include "ops/batch.h"
#include "ops/comm.h"
#include "ops/ops.h"

namespace codefuse {

// This rank's share (the whole for one rank): heads and MLP rows are split, norms and the embedding are whole.
struct Layer {
  Norm norm1, norm2;                    // norm2 is unused with parallel_one_norm
  Linear qkv, attn_out;                 // [(heads + 2 kv_heads) D, H], [H, heads D]
  Linear mlp_up, mlp_gate, mlp_down;    // [F, H], [F, H] if gated, [H, F]
  KvLayer kv;
};

struct ModelWeights {
  Matrix embed, position;  // [V, H], [max_positions, H] for learned positions
  std::vector<Layer> layers;
  Norm final_norm;
  Linear head;                               // [V share, H]
  int64_t bytes = 0;                         // read by one decode step
  int64_t loaded = 0;                        // given to the device
};

// Loads this rank's share; finished when ops.finish_loading() is. ValueError if the model cannot be split this way; LoadError names file, tensor, expected, found.
ModelWeights load_model_weights(const ModelConfig& config, const Weights& files, Ops& ops, const Comm& comm);

class Model {
 public:
  // Allocates what limits asks for. ops and comm must outlive it.
  Model(const ModelConfig& config, ModelWeights weights, const Limits& limits, Ops& ops, Comm& comm);

  void forward();  // the body of a step: from tokens to sampled tokens
  const float* logits() const { return logits_; }  // [samples, V] of the last step, in the device's memory
  int64_t weight_bytes() const { return weights_.bytes; }

 private:
  const void* input(const Linear& w, const void* x, int buffer = 0);  // x [T, K], in w's order
  void attention_block(Layer& layer);
  void mlp_block(Layer& layer, const void* normed);
  void parallel_layer(Layer& layer);
  void separate_layer(Layer& layer);
  bool is_last(const Layer& layer) const { return &layer == &weights_.layers.back(); }
  void keep_sampled(const Layer& layer, const void** normed);
  template <class F>
  void add_to_residual(const F& parts);

  const ModelConfig config_;
  ModelWeights weights_;
  Ops& ops_;
  Comm& comm_;
  const int heads_, kv_heads_, intermediate_;  // this rank's
  float *x_, *partial_ = nullptr;              // [T, H]: the residual stream; this rank's part of a sum, zero in between
  float *all_x_, *kept_x_;                     // x_ of all rows, and after keep_sampled()
  void *normed_, *normed2_ = nullptr, *qkv_, *attended_, *up_, *gated_ = nullptr;
  void *all_attended_, *kept_attended_, *kept_normed_;  // likewise
  void* ordered_[2] = {};                      // [T, the most columns] where a linear layer has an order
  std::vector<KvLayer> kv_;                    // [layers]
  float *last_, *local_logits_, *logits_;      // [S, H], [S, V share], [S, V]
  void* last_normed_;                          // [S, H]
};

// Bytes of KV cache per page on one rank.
int64_t kv_page_bytes(const ModelConfig& config, DType act, int world);

}  // namespace codefuse
