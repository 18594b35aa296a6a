#include "model/model.h"

#include <algorithm>

namespace codefuse {

Model::Model(const ModelConfig& config, ModelWeights weights, const Limits& limits, Ops& ops, Comm& comm)
    : config_(config), weights_(std::move(weights)), ops_(ops), comm_(comm), heads_(config.heads / comm.world()),
      kv_heads_(config.kv_heads / comm.world()), intermediate_(config.intermediate / comm.world()) {
  const size_t t = size_t(limits.rows), s = kDecodeRows, act = size_of(ops.act());
  const size_t h = size_t(config.hidden), d = size_t(config.head_dim), f = size_t(intermediate_), v = size_t(config.vocab);
  const auto floats = [&](size_t n) { return static_cast<float*>(ops.alloc(n * sizeof(float))); };
  const size_t kept = std::min(t, 2 * s);
  all_x_ = x_ = floats(t * h);
  kept_x_ = floats(kept * h);
  if (comm.world() > 1) partial_ = floats(t * h);
  normed_ = ops.alloc(t * h * act);
  if (config.residual == ResidualKind::parallel_two_norms) normed2_ = ops.alloc(t * h * act);
  qkv_ = ops.alloc(t * size_t(heads_ + 2 * kv_heads_) * d * act);
  all_attended_ = attended_ = ops.alloc(t * size_t(heads_) * d * act);
  kept_attended_ = ops.alloc(kept * size_t(heads_) * d * act);
  kept_normed_ = ops.alloc(kept * h * act);
  up_ = ops.alloc(t * f * act);
  if (config.gated) gated_ = ops.alloc(t * f * act);
  size_t columns = 0;
  for (const Layer& layer : weights_.layers)
    for (const Linear* w : {&layer.qkv, &layer.attn_out, &layer.mlp_up, &layer.mlp_gate, &layer.mlp_down})
      if (w->order) columns = std::max(columns, size_t(w->weight.cols));
  for (void*& buffer : ordered_)
    if (columns) buffer = ops.alloc(t * columns * act);
  last_ = floats(s * h);
  last_normed_ = ops.alloc(s * h * act);
  logits_ = floats(s * v);
  local_logits_ = comm.world() > 1 ? floats(s * size_t(weights_.head.weight.rows)) : logits_;
  for (Layer& layer : weights_.layers) {
    const size_t bytes = size_t(limits.pages) * size_t(kv_heads_) * kPageTokens * d * act;
    layer.kv.k = ops.alloc(bytes);
    layer.kv.v = ops.alloc(bytes);
    kv_.push_back(layer.kv);
  }
  ops.plan(config, limits, true);
}

const void* Model::input(const Linear& w, const void* x, int buffer) {
  if (!w.order) return x;
  ops_.take_columns(ordered_[buffer], x, w.order, w.weight.cols);
  return ordered_[buffer];
}

// x += the sum over ranks of what parts(y) adds to y
template <class F>
void Model::add_to_residual(const F& parts) {
  if (comm_.world() == 1) return parts(x_);
  parts(partial_);
  comm_.add_sum(x_, partial_, int64_t(ops_.rows()) * config_.hidden);
}

// Behind the last layer's attention only what is sampled goes on: the rows of x, of attention's output, and of what else is still to be read.
void Model::keep_sampled(const Layer& layer, const void** normed) {
  if (!is_last(layer) || !ops_.keep_sampled()) return;
  const size_t act = size_of(ops_.act());
  ops_.take_kept(kept_x_, x_, size_t(config_.hidden) * sizeof(float));
  ops_.take_kept(kept_attended_, attended_, size_t(heads_) * size_t(config_.head_dim) * act);
  x_ = kept_x_;
  attended_ = kept_attended_;
  if (!normed) return;
  ops_.take_kept(kept_normed_, *normed, size_t(config_.hidden) * act);
  *normed = kept_normed_;
}

void Model::attention_block(Layer& layer) {
  ops_.linear(qkv_, input(layer.qkv, normed_), layer.qkv);
  ops_.rope_attention(attended_, qkv_, layer.kv, config_, heads_, kv_heads_);
}

void Model::mlp_block(Layer& layer, const void* normed) {
  if (config_.gated) {
    ops_.linear(gated_, input(layer.mlp_gate, normed), layer.mlp_gate);
    ops_.linear(up_, input(layer.mlp_up, normed), layer.mlp_up);
    ops_.gate(up_, gated_, up_, config_.activation, intermediate_);
  } else {
    ops_.linear(up_, input(layer.mlp_up, normed), layer.mlp_up, &config_.activation);
  }
}

// Attention and an ungated MLP side by side.
void Model::parallel_layer(Layer& layer) {
  const bool two = config_.residual == ResidualKind::parallel_two_norms;
  if (two) {
    ops_.norm_pair(normed_, layer.norm1, normed2_, layer.norm2, x_, config_.norm, config_.norm_eps, config_.hidden);
  } else {
    ops_.norm(normed_, x_, layer.norm1, config_.norm, config_.norm_eps, config_.hidden);
  }
  const void *to_qkv = input(layer.qkv, normed_), *to_up = input(layer.mlp_up, two ? normed2_ : normed_, 1);
  ops_.linear_pair(qkv_, to_qkv, layer.qkv, nullptr, up_, to_up, layer.mlp_up, &config_.activation, is_last(layer));
  ops_.rope_attention(attended_, qkv_, layer.kv, config_, heads_, kv_heads_);
  keep_sampled(layer, &to_up);
  if (ops_.rows() == 0) return;
  if (is_last(layer)) ops_.linear(up_, to_up, layer.mlp_up, &config_.activation, Rows::prefill);
  const void *to_out = input(layer.attn_out, attended_), *to_down = input(layer.mlp_down, up_, 1);
  add_to_residual([&](float* y) { ops_.linear_add_pair(y, to_out, layer.attn_out, to_down, layer.mlp_down, comm_.rank() == 0); });
}

// One product at a time.
void Model::separate_layer(Layer& layer) {
  const bool first = comm_.rank() == 0;  // adds the biases of sums over ranks
  const auto norm = [&](const Norm& n) { ops_.norm(normed_, x_, n, config_.norm, config_.norm_eps, config_.hidden); };
  const void* to_mlp = normed_;
  norm(layer.norm1);
  attention_block(layer);
  keep_sampled(layer, config_.residual == ResidualKind::parallel_one_norm ? &to_mlp : nullptr);
  if (ops_.rows() == 0) return;
  if (config_.residual == ResidualKind::serial) {
    add_to_residual([&](float* y) { ops_.linear_add(y, input(layer.attn_out, attended_), layer.attn_out, first); });
    norm(layer.norm2);
    mlp_block(layer, to_mlp);
    add_to_residual([&](float* y) { ops_.linear_add(y, input(layer.mlp_down, up_), layer.mlp_down, first); });
  } else {
    if (config_.residual == ResidualKind::parallel_two_norms) norm(layer.norm2);
    mlp_block(layer, to_mlp);
    add_to_residual([&](float* y) {
      ops_.linear_add(y, input(layer.attn_out, attended_), layer.attn_out, first);
      ops_.linear_add(y, input(layer.mlp_down, up_), layer.mlp_down, first);
    });
  }
}

void Model::forward() {
  const int h = config_.hidden;
  x_ = all_x_;
  attended_ = all_attended_;
  ops_.copy_pages(kv_, config_, kv_heads_);
  ops_.embed(x_, weights_.embed);
  if (config_.position == PositionKind::learned) ops_.add_position(x_, weights_.position);
  const bool parallel = config_.residual != ResidualKind::serial && !config_.gated;
  for (Layer& layer : weights_.layers) parallel ? parallel_layer(layer) : separate_layer(layer);
  if (ops_.rows() == 0) return;  // prefill rows of which none is sampled

  ops_.gather_logit_rows(last_, x_, h);
  ops_.norm_logit_rows(last_normed_, last_, weights_.final_norm, config_.norm, config_.norm_eps, h);
  ops_.logits(local_logits_, last_normed_, weights_.head);
  if (comm_.world() > 1) comm_.all_gather_columns(logits_, local_logits_, ops_.samples(), config_.vocab);
  ops_.sample(logits_, config_.vocab);
}

int64_t kv_page_bytes(const ModelConfig& c, DType act, int world) {
  return int64_t(c.layers) * 2 * (c.kv_heads / world) * kPageTokens * c.head_dim * int64_t(size_of(act));
}

}  // namespace codefuse
