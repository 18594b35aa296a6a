// Names, shapes and per-rank slices of the weights.
#include <algorithm>
#include <cstring>
#include <set>

#include "model/model.h"

namespace codefuse {

namespace {

struct Range {
  int64_t begin, count;
};

class Loader {
 public:
  Loader(const ModelConfig& c, const Weights& files, Ops& ops, const Comm& comm, ModelWeights& out)
      : c_(c), files_(files), ops_(ops), rank_(comm.rank()), world_(comm.world()), out_(out) {}

  void run() {
    const int64_t h = c_.hidden, f = c_.intermediate, d = c_.head_dim;
    out_.embed = load({table("embed.weight", c_.vocab, h)});
    if (c_.position == PositionKind::learned) out_.position = load({table("position.weight", c_.max_positions, h)});

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
    const std::string head = c_.tied ? "embed" : "lm_head";
    out_.head.weight = matrix({host(head, c_.vocab, h).row_slice(vocab.begin, vocab.count)});
    out_.head.bias = bias("lm_head.bias", c_.vocab, {vocab});
    files_.check_all_used(used_);
  }

 private:
  // This rank's part of `count` rows from `begin`.
  Range share(int64_t begin, int64_t count) const {
    const int64_t from = share_begin(count, rank_, world_);
    return {begin + from, share_begin(count, rank_ + 1, world_) - from};
  }

  [[noreturn]] void fail(const std::string& name, const TensorView& t, const std::string& why) const {
    throw LoadError(cat(files_.directory(), "/", t.file, ": tensor ", name, " ", why));
  }

  // An unquantized tensor of rows x cols elements.
  HostMatrix view(const std::string& name, const TensorView& t, int64_t rows, int64_t cols) const {
    HostMatrix m;
    switch (t.element) {
      case Element::f32: m.format = Format::f32; break;
      case Element::f16: m.format = Format::f16; break;
      case Element::bf16: m.format = Format::bf16; break;
      default: fail(name, t, cat("has dtype ", name_of(t.element), "; expected F32, F16 or BF16"));
    }
    m.rows = rows;
    m.cols = cols;
    m.data = t.data;
    m.stride = row_bytes(m.format, cols);
    return m;
  }

  // Looked up by row: never quantized.
  HostMatrix table(const std::string& name, int64_t rows, int64_t cols) {
    used_.insert(name);
    return view(name, files_.at(name, {rows, cols}), rows, cols);
  }

  HostRows part(const std::string& name, const std::vector<int64_t>& shape, Element element) {
    used_.insert(name);
    const TensorView& t = files_.at(name, shape, element);
    return {t.data, (shape.size() > 1 ? size_t(shape[1]) : 1) * size_of(element)};
  }

  // NAME.weight, and if it is quantized NAME.scale and NAME.zero
  HostMatrix host(const std::string& name, int64_t rows, int64_t cols) {
    const std::string weight = name + ".weight";
    const TensorView* t = files_.find(weight);
    if (!t || t->format.empty()) return table(weight, rows, cols);
    HostMatrix m;
    try {
      m.format = parse_format(t->format);
    } catch (const ValueError& e) {
      fail(weight, *t, e.what());
    }
    if (!is_quantized(m.format)) fail(weight, *t, cat("has format ", t->format, " in the metadata; expected ", quantized_formats()));
    if (cols % column_unit(m.format)) fail(weight, *t, cat("has ", cols, " columns; expected a multiple of ", column_unit(m.format), " in ", t->format));
    m.rows = rows;
    m.cols = cols;
    HostRows codes;
    if (m.format == Format::q8_row) {
      codes = part(weight, {rows, cols}, Element::i8);
      m.scale = part(name + ".scale", {rows}, Element::f32);
    } else {
      codes = part(weight, {rows, cols / 2}, Element::u8);
      m.scale = part(name + ".scale", {rows, cols / group_cols(m.format)}, Element::f16);
      m.zero = part(name + ".zero", {rows, cols / group_cols(m.format)}, Element::u8);
      const uint8_t greatest = m.zero.data ? *std::max_element(m.zero.row(0), m.zero.row(rows)) : 0;
      if (greatest > 15) fail(name + ".zero", *t, cat("holds ", int(greatest), "; expected 0 to 15"));
    }
    m.data = codes.data;
    m.stride = codes.stride;
    return m;
  }

  std::vector<HostMatrix> rows_of(const HostMatrix& m, const std::vector<Range>& ranges) const {
    if (world_ == 1) return {m};
    std::vector<HostMatrix> parts;
    for (const Range& r : ranges) parts.push_back(m.row_slice(r.begin, r.count));
    return parts;
  }

  Matrix load(const std::vector<HostMatrix>& parts) {
    for (const HostMatrix& m : parts) out_.loaded += int64_t(m.bytes());
    return ops_.load_matrix(parts);
  }

  Matrix matrix(const std::vector<HostMatrix>& parts) {
    for (const HostMatrix& m : parts) out_.bytes += int64_t(m.bytes());
    return load(parts);
  }

  // nullptr if the file has none
  const float* bias(const std::string& name, int64_t n, const std::vector<Range>& ranges) {
    if (!files_.has(name)) return nullptr;
    used_.insert(name);
    const HostMatrix whole = view(name, files_.at(name, {n}), n, 1);
    std::vector<uint8_t> bytes;
    for (const HostMatrix& m : rows_of(whole, ranges)) bytes.insert(bytes.end(), m.data, m.data + size_t(m.rows) * m.stride);
    HostMatrix joined = whole;
    joined.rows = 1;
    joined.cols = int64_t(bytes.size() / whole.stride);
    joined.data = bytes.data();
    joined.stride = bytes.size();
    out_.bytes += joined.cols * 4;
    out_.loaded += joined.cols * 4;
    return ops_.load_vector(joined);
  }

  Norm norm(const std::string& name) {
    files_.at(name + ".weight", {c_.hidden});
    return {bias(name + ".weight", c_.hidden, {{0, c_.hidden}}), bias(name + ".bias", c_.hidden, {{0, c_.hidden}})};
  }

  // The order of a matrix's columns (I32), nullptr if the file has none
  const int32_t* order(const std::string& name, int64_t cols) {
    if (!files_.has(name)) return nullptr;
    used_.insert(name);
    const TensorView& t = files_.at(name, {cols}, Element::i32);
    std::vector<int32_t> values(static_cast<size_t>(cols));
    std::memcpy(values.data(), t.data, values.size() * sizeof(int32_t));
    std::vector<bool> seen(values.size());
    for (int32_t v : values) {
      if (v < 0 || v >= cols || seen[size_t(v)]) fail(name, t, cat("has ", v, v < 0 || v >= cols ? "" : " twice", "; expected every column from 0 to ", cols - 1, " once"));
      seen[size_t(v)] = true;
    }
    void* out = ops_.alloc(values.size() * sizeof(int32_t));
    ops_.upload(out, values.data(), values.size() * sizeof(int32_t));
    out_.bytes += cols * int64_t(sizeof(int32_t));
    out_.loaded += cols * int64_t(sizeof(int32_t));
    return static_cast<const int32_t*>(out);
  }

  Linear by_rows(const std::string& name, int64_t rows, int64_t cols, const std::vector<Range>& ranges) {
    return {matrix(rows_of(host(name, rows, cols), ranges)), bias(name + ".bias", rows, ranges), order(name + ".order", cols)};
  }

  // The bias is whole: one rank adds it.
  Linear by_columns(const std::string& name, int64_t rows, int64_t cols, Range range) {
    const HostMatrix whole = host(name, rows, cols);
    const int64_t unit = column_unit(whole.format);
    if (world_ > 1 && files_.has(name + ".order"))
      throw ValueError(cat("tensor_parallel is ", world_, ", but the columns of ", name, ".weight are in an order of their own and cannot be shared"));
    if (world_ > 1 && (range.begin % unit || range.count % unit))
      throw ValueError(cat("tensor_parallel is ", world_, ", but the ", cols, " columns of ", name, ".weight in ", name_of(whole.format),
                           " can only be shared in multiples of ", unit));
    return {matrix({whole.col_slice(range.begin, range.count)}), bias(name + ".bias", rows, {{0, rows}}), order(name + ".order", cols)};
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
  return out;
}

}  // namespace codefuse
