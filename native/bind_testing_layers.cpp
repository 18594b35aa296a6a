// The layers of a model without the rest of it: what each op of theirs takes, for tools/bench_kernels.py.
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <map>

#include "bind_testing.h"
#include "core/safetensors.h"
#include "model/model.h"
#include "model/random_weights.h"
#include "ops/comm.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

class Layers {
 public:
  // Room for steps of up to decode_rows rows, each of a sequence of its own at `position`, and of prefill_rows tokens of one prompt.
  Layers(const std::string& weights, const std::string& device, const std::string& dtype, int decode_rows, int position, int prefill_rows, int threads)
      : position_(position) {
    const std::string path = weights + "/config.json", text = read_text(path);
    config_ = parse_model_config(text, path);
    if (config_.residual != ResidualKind::parallel_two_norms || config_.gated)
      throw ValueError(cat(path, ": residual or gated; expected a model whose attention and ungated MLP are side by side, with a norm each"));
    in_range("decode_rows", decode_rows, 1, kDecodeRows);
    in_range("position", position, 0, config_.max_positions - 1);
    in_range("prefill_rows", prefill_rows, 1, config_.max_positions);
    const std::optional<RandomSpec> random = parse_random_spec(text, path);
    files_ = random ? make_random_weights(config_, *random, weights) : std::make_unique<Weights>(weights);
    const Element element = files_->at("embed.weight", {config_.vocab, config_.hidden}).element;
    ops_ = make_ops(device, dtype, element == Element::f16 ? DType::f16 : element == Element::bf16 ? DType::bf16 : DType::f32, threads);
    weights_ = load_model_weights(config_, *files_, *ops_, comm_);
    ops_->finish_loading();
    for (const Layer& layer : weights_.layers)
      for (const Linear* w : {&layer.qkv, &layer.attn_out, &layer.mlp_up, &layer.mlp_down})
        if (w->order) throw ValueError(cat(path, ": a matrix has its columns in another order than its inputs; expected none"));
    limits_.slots = decode_rows;
    limits_.rows = std::max(decode_rows, prefill_rows);
    limits_.max_len = std::max(position + 1, prefill_rows);
    limits_.pages = std::max(decode_rows * pages_for(position + 1), pages_for(prefill_rows));
    const size_t rows = size_t(limits_.rows), h = size_t(config_.hidden), d = size_t(config_.head_dim), act = size_of(ops_->act());
    x_ = static_cast<float*>(filled(rows * h, DType::f32));
    for (void** to : {&normed_, &normed2_}) *to = filled(rows * h, ops_->act());
    for (void** to : {&qkv_, &other_qkv_}) *to = filled(rows * size_t(config_.qkv_rows()), ops_->act());
    attended_ = filled(rows * size_t(config_.heads) * d, ops_->act());
    up_ = filled(rows * size_t(config_.intermediate), ops_->act());
    kv_bytes_ = size_t(config_.kv_heads) * d * act * 2;
    const size_t kv = size_t(limits_.pages) * size_t(config_.kv_heads) * kPageTokens * d;
    for (Layer& layer : weights_.layers) layer.kv = {filled(kv, ops_->act()), filled(kv, ops_->act())};
    ops_->plan(config_, limits_, true);
  }

  std::string device() const { return ops_->device(); }
  std::string dtype() const { return name_of(ops_->act()); }
  int layers() const { return config_.layers; }
  size_t kv_bytes() const { return kv_bytes_; }  // of one token in one layer
  int64_t attended_products() const { return int64_t(config_.heads) * config_.head_dim * 2; }  // of one row with one position

  // Of one layer's matrices as their format stores them; rows x columns by name.
  size_t weight_bytes() const {
    size_t bytes = 0;
    for (const auto& [name, m] : matrices()) bytes += size_t(m->rows) * (row_bytes(m->host.format, m->cols) + scale_bytes(m->host.format, m->cols) + zero_bytes(m->host.format, m->cols));
    return bytes;
  }
  std::map<std::string, std::pair<int64_t, int64_t>> shapes() const {
    std::map<std::string, std::pair<int64_t, int64_t>> out;
    for (const auto& [name, m] : matrices()) out[name] = {m->rows, m->cols};
    return out;
  }

  // Seconds that these ops take in all layers, one layer after the other, each of `repeats` times.
  std::vector<double> time(const std::vector<std::string>& names, int decode_rows, int prefill_rows, int repeats) {
    in_range("decode_rows", decode_rows, 0, limits_.slots);
    in_range("prefill_rows", prefill_rows, 0, limits_.rows);
    in_range("repeats", repeats, 1, 1000);
    if ((decode_rows > 0) == (prefill_rows > 0)) throw ValueError(cat("decode_rows is ", decode_rows, " and prefill_rows ", prefill_rows, "; expected one of them above 0"));
    std::vector<const std::function<void(Layer&)>*> chosen;
    for (const std::string& name : names) {
      const auto it = ops_by_name_.find(name);
      if (it == ops_by_name_.end()) {
        std::string known;
        for (const auto& [other, op] : ops_by_name_) known += (known.empty() ? "" : ", ") + other;
        throw ValueError(cat("op is '", name, "'; expected one of ", known));
      }
      chosen.push_back(&it->second);
    }
    return ops_->time(decode_rows ? decoding(decode_rows) : prompt(prefill_rows), repeats, [&] {
      for (Layer& layer : weights_.layers)
        for (const auto* op : chosen) (*op)(layer);
    });
  }

 private:
  static int pages_for(int tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }
  static void in_range(const char* field, int value, int low, int high) {
    if (value < low || value > high) throw ValueError(cat(field, " is ", value, "; expected ", low, " to ", high));
  }

  std::vector<std::pair<std::string, const Matrix*>> matrices() const {
    const Layer& l = weights_.layers[0];
    return {{"qkv", &l.qkv.weight}, {"attn_out", &l.attn_out.weight}, {"mlp_up", &l.mlp_up.weight}, {"mlp_down", &l.mlp_down.weight}};
  }

  // n elements of random sign, from 1/8 to 1/4: zeros would let the device run cooler, and so faster, than it does
  void* filled(size_t n, DType t) {
    const size_t bytes = (n * size_of(t) + 3) / 4 * 4, piece = size_t(64) << 20;
    const uint32_t random = t == DType::f32 ? 0x807fffffu : t == DType::f16 ? 0x83ff83ffu : 0x807f807fu;
    const uint32_t base = t == DType::f32 ? 0x3e000000u : t == DType::f16 ? 0x30003000u : 0x3e003e00u;
    std::vector<uint32_t> words(std::min(bytes, piece) / 4);
    uint32_t state = 0x9e3779b9u;
    for (uint32_t& w : words) {
      state ^= state << 13, state ^= state >> 17, state ^= state << 5;
      w = (state & random) | base;
    }
    auto* out = static_cast<char*>(ops_->alloc(bytes));
    for (size_t at = 0; at < bytes; at += piece) ops_->upload(out + at, words.data(), std::min(piece, bytes - at));
    return out;
  }

  void put_sequence(Batch* b, int slot, int first_page, int tokens) const {
    b->table_slot.push_back(slot);
    const size_t begin = b->table.size();
    b->table.resize(begin + size_t(limits_.max_pages()), 0);
    for (int p = 0; p < pages_for(tokens); ++p) b->table[begin + size_t(p)] = first_page + p;
  }
  Batch decoding(int rows) const {
    Batch b;
    b.decode_rows = rows;
    for (int i = 0; i < rows; ++i) {
      b.token.push_back(0), b.slot.push_back(i), b.position.push_back(position_);
      put_sequence(&b, i, i * pages_for(position_ + 1), position_ + 1);
    }
    return b;
  }
  Batch prompt(int rows) const {
    Batch b;
    for (int i = 0; i < rows; ++i) b.token.push_back(0), b.slot.push_back(0), b.position.push_back(i);
    b.chunks.push_back({0, rows, 0, 0});
    put_sequence(&b, 0, 0, rows);
    return b;
  }

  ModelConfig config_;
  const int position_;
  std::unique_ptr<Weights> files_;  // the CPU reads the weights where they are
  SingleComm comm_;
  std::unique_ptr<Ops> ops_;
  ModelWeights weights_;
  Limits limits_;
  float* x_ = nullptr;                                                                                    // [T, H]
  void *normed_ = nullptr, *normed2_ = nullptr, *qkv_ = nullptr, *other_qkv_ = nullptr, *attended_ = nullptr, *up_ = nullptr;  // as in Model
  size_t kv_bytes_ = 0;
  const std::map<std::string, std::function<void(Layer&)>> ops_by_name_{
      {"norm_pair", [this](Layer& l) { ops_->norm_pair(normed_, l.norm1, normed2_, l.norm2, x_, config_.norm, config_.norm_eps, config_.hidden); }},
      {"linear_pair", [this](Layer& l) { ops_->linear_pair(qkv_, normed_, l.qkv, nullptr, up_, normed2_, l.mlp_up, &config_.activation); }},
      {"rope_attention", [this](Layer& l) { ops_->rope_attention(attended_, qkv_, l.kv, config_, config_.heads, config_.kv_heads); }},
      // of a QKV that no op of the layer writes, so not beside linear_pair
      {"rope_attention after", [this](Layer& l) { ops_->rope_attention(attended_, other_qkv_, l.kv, config_, config_.heads, config_.kv_heads); }},
      {"linear_add_pair", [this](Layer& l) { ops_->linear_add_pair(x_, attended_, l.attn_out, up_, l.mlp_down); }},
      {"qkv", [this](Layer& l) { ops_->linear(qkv_, normed_, l.qkv); }},
      {"mlp_up", [this](Layer& l) { ops_->linear(up_, normed2_, l.mlp_up, &config_.activation); }},
      {"attn_out", [this](Layer& l) { ops_->linear_add(x_, attended_, l.attn_out); }},
      {"mlp_down", [this](Layer& l) { ops_->linear_add(x_, up_, l.mlp_down); }},
      {"rope_store", [this](Layer& l) { ops_->rope_store(qkv_, l.kv, config_, config_.heads, config_.kv_heads); }},
      {"attention", [this](Layer& l) { ops_->attention(attended_, qkv_, l.kv, config_, config_.heads, config_.kv_heads); }},
  };
};

}  // namespace

void bind_testing_layers(py::module_& m) {
  using namespace py::literals;
  using unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Layers>(m, "Layers")
      .def(py::init<const std::string&, const std::string&, const std::string&, int, int, int, int>(), unlocked(), "weights"_a, py::kw_only(),
           "device"_a = "cuda", "dtype"_a = "auto", "decode_rows"_a = 1, "position"_a = 0, "prefill_rows"_a = 1, "threads"_a = 0)
      .def_property_readonly("device", &Layers::device)
      .def_property_readonly("dtype", &Layers::dtype)
      .def_property_readonly("layers", &Layers::layers)
      .def_property_readonly("weight_bytes", &Layers::weight_bytes)
      .def_property_readonly("kv_bytes", &Layers::kv_bytes)
      .def_property_readonly("attended_products", &Layers::attended_products)
      .def_property_readonly("shapes", &Layers::shapes)
      .def("time", &Layers::time, unlocked(), "ops"_a, py::kw_only(), "decode_rows"_a = 0, "prefill_rows"_a = 0, "repeats"_a = 15);
}
