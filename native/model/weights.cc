// Names, shapes and per-rank slices of the weights.
#include <set>

#include "model/model.h"

namespace codefuse {

namespace {

Format format_of(DType t) { return t == DType::f32 ? Format::f32 : t == DType::f16 ? Format::f16 : Format::bf16; }

struct Range {
  int64_t begin, count;
};

class Loader {
 public:
  Loader(const ModelConfig& c, const Weights& files, Ops& ops, const Comm& comm, ModelWeights& out)
      : c_(c), files_(files), ops_(ops), rank_(comm.rank()), world_(comm.world()), out_(out) {}

  void run() {
    const int64_t h = c_.hidden, f = c_.intermediate, d = c_.head_dim;
    out_.embed = ops_.load_matrix(host("embed.weight", c_.vocab, h));
    if (c_.position == PositionKind::learned) out_.position = ops_.load_matrix(host("position.weight", c_.max_positions, h));

    const Range mlp = share(0, f), heads = share(0, c_.heads * d);
    const std::vector<Range> qkv = {heads, share(c_.heads * d, c_.kv_heads * d), share((c_.heads + c_.kv_heads) * d, c_.kv_heads * d)};
    for (int i = 0; i < c_.layers; ++i) {
      const std::string at = cat("layers.", i, ".");
      Layer layer;
      layer.norm1 = norm(at + "norm1");
      if (c_.two_norms()) layer.norm2 = norm(at + "norm2");
      layer.qkv = by_rows(at + "qkv", c_.qkv_rows(), h, qkv);
      layer.attn_out = by_columns(at + "attn_out", h, c_.heads * d, heads);
      layer.mlp_up = by_rows(at + "mlp_up", f, h, {mlp});
      if (c_.gated) layer.mlp_gate = by_rows(at + "mlp_gate", f, h, {mlp});
      layer.mlp_down = by_columns(at + "mlp_down", h, f, mlp);
      out_.layers.push_back(layer);
    }
    out_.final_norm = norm("final_norm");
    const Range vocab = share(0, c_.vocab);
    const std::string head = c_.tied ? "embed.weight" : "lm_head.weight";
    out_.head.weight = matrix(host(head, c_.vocab, h).row_slice(vocab.begin, vocab.count));
    out_.head.bias = bias("lm_head.bias", c_.vocab, {vocab});
    files_.check_all_used(used_);
  }

 private:
  // This rank's part of `count` rows from `begin`.
  Range share(int64_t begin, int64_t count) const {
    const int64_t from = share_begin(count, rank_, world_);
    return {begin + from, share_begin(count, rank_ + 1, world_) - from};
  }

  HostMatrix view(const TensorView& t, int64_t rows, int64_t cols) {
    HostMatrix m;
    m.format = format_of(t.dtype);
    m.rows = rows;
    m.cols = cols;
    m.data = t.data;
    m.stride = row_bytes(m.format, cols);
    return m;
  }

  HostMatrix host(const std::string& name, int64_t rows, int64_t cols) {
    used_.insert(name);
    return view(files_.at(name, {rows, cols}), rows, cols);
  }

  // The ranges of rows one after the other; a copy only if there are several.
  HostMatrix rows_of(const HostMatrix& m, const std::vector<Range>& ranges) {
    if (world_ == 1) return m;
    if (ranges.size() == 1) return m.row_slice(ranges[0].begin, ranges[0].count);
    std::vector<uint8_t> bytes;
    for (const Range& r : ranges) {
      const uint8_t* from = m.data + size_t(r.begin) * m.stride;
      bytes.insert(bytes.end(), from, from + size_t(r.count) * m.stride);
    }
    out_.joined.push_back(std::move(bytes));
    HostMatrix joined = m;
    joined.data = out_.joined.back().data();
    joined.rows = int64_t(out_.joined.back().size() / m.stride);
    return joined;
  }

  Matrix matrix(const HostMatrix& m) {
    out_.bytes += m.rows * int64_t(row_bytes(m.format, m.cols));
    return ops_.load_matrix(m);
  }

  // nullptr if the file has none
  const float* bias(const std::string& name, int64_t n, const std::vector<Range>& ranges) {
    if (!files_.has(name)) return nullptr;
    used_.insert(name);
    HostMatrix m = rows_of(view(files_.at(name, {n}), n, 1), ranges);
    m.cols = m.rows;
    m.rows = 1;
    out_.bytes += m.cols * 4;
    return ops_.load_vector(m);
  }

  Norm norm(const std::string& name) {
    files_.at(name + ".weight", {c_.hidden});
    return {bias(name + ".weight", c_.hidden, {{0, c_.hidden}}), bias(name + ".bias", c_.hidden, {{0, c_.hidden}})};
  }

  Linear by_rows(const std::string& name, int64_t rows, int64_t cols, const std::vector<Range>& ranges) {
    return {matrix(rows_of(host(name + ".weight", rows, cols), ranges)), bias(name + ".bias", rows, ranges)};
  }

  // The bias is whole: one rank adds it.
  Linear by_columns(const std::string& name, int64_t rows, int64_t cols, Range range) {
    return {matrix(host(name + ".weight", rows, cols).col_slice(range.begin, range.count)), bias(name + ".bias", rows, {{0, rows}})};
  }

  const ModelConfig& c_;
  const Weights& files_;
  Ops& ops_;
  const int rank_, world_;
  ModelWeights& out_;
  std::set<std::string> used_;
};

void divisible(const char* what, int64_t value, int world) {
  if (value % world)
    throw ValueError(cat("tensor_parallel is ", world, ", but the model's ", what, ", ", value, ", is not divisible by it"));
}

}  // namespace

ModelWeights load_model_weights(const ModelConfig& config, const Weights& files, Ops& ops, const Comm& comm) {
  divisible("heads", config.heads, comm.world());
  divisible("kv_heads", config.kv_heads, comm.world());
  divisible("intermediate", config.intermediate, comm.world());
  if (config.vocab < comm.world()) throw ValueError(cat("tensor_parallel is ", comm.world(), ", but the vocab is only ", config.vocab));
  ModelWeights out;
  Loader(config, files, ops, comm, out).run();
  if (ops.device() != "cpu") out.joined.clear();  // the device has its own copy
  return out;
}

}  // namespace codefuse
