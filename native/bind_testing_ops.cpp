// Every op on any device with numpy arrays, for tests/test_ops.py and tests/test_cuda.py. Activations go in and out as float32
// arrays, rounded to the compute dtype on the way.
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "bind_formats.h"
#include "bind_testing.h"
#include "ops/ops.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

using MaybeFloats = std::optional<Floats>;

constexpr size_t kGuard = 256;  // bytes on either side of every output

class TestOps {
 public:
  TestOps(const std::string& device, const std::string& dtype, int threads, const std::string& kernels, int shared_max)
      : ops_(kernels.empty() ? make_ops(device, dtype, DType::f32, threads, shared_max) : make_cpu_ops(threads, kernels)) {}

  std::string device() const { return ops_->device(); }
  std::string dtype() const { return name_of(ops_->act()); }
  size_t free_memory() const { return ops_->free_memory(); }

  void plan(const std::string& config, int slots, int rows, int max_len, int pages) {
    config_ = parse_model_config(config, "config");
    limits_ = {slots, rows, max_len, pages};
    ops_->plan(config_, limits_, false);
  }

  Floats embed(const py::dict& batch, const py::object& table, const std::string& format) {
    const Matrix m = matrix(table, format);
    Buffer y = out({rows(batch), m.cols}, DType::f32);
    run(batch, [&] { ops_->embed(y.floats(), m); });
    return read(y);
  }

  // parts: rows of each part that it is loaded in
  Floats read_matrix(const py::object& weight, const std::string& format, const std::vector<int64_t>& parts) {
    const HostMatrix whole = host_matrix(format, weight);
    std::vector<HostMatrix> pieces;
    int64_t row = 0;
    for (int64_t rows : parts) pieces.push_back(whole.row_slice(row, rows)), row += rows;
    if (parts.empty()) pieces.push_back(whole);
    if (!parts.empty() && row != whole.rows) throw ValueError("parts do not add up to the matrix");
    const Matrix m = ops_->load_matrix(pieces);
    ops_->finish_loading();
    Buffer y = out({m.rows, m.cols}, DType::f32);
    ops_->read_matrix(y.floats(), m);
    return read(y);
  }

  Floats add_position(const py::dict& batch, const Floats& x, const py::object& table, const std::string& format) {
    const Matrix m = matrix(table, format);
    Buffer y = in(x, DType::f32);
    run(batch, [&] { ops_->add_position(y.floats(), m); });
    return read(y);
  }

  Floats norm(const py::dict& batch, const Floats& x, const MaybeFloats& weight, const MaybeFloats& bias, const std::string& kind,
              float eps, bool logit_rows) {
    const Norm n{vector(weight), vector(bias)};
    Buffer from = in(x, DType::f32), y = out({x.shape(0), x.shape(1)}, ops_->act());
    const int hidden = int(x.shape(1));
    run(batch, [&] {
      if (logit_rows) {
        ops_->norm_logit_rows(y.data, from.floats(), n, parse_norm(kind), eps, hidden);
      } else {
        ops_->norm(y.data, from.floats(), n, parse_norm(kind), eps, hidden);
      }
    });
    return read(y);
  }

  py::tuple norm_pair(const py::dict& batch, const Floats& x, const MaybeFloats& weight_a, const MaybeFloats& bias_a, const MaybeFloats& weight_b,
                      const MaybeFloats& bias_b, const std::string& kind, float eps) {
    const Norm a{vector(weight_a), vector(bias_a)}, b{vector(weight_b), vector(bias_b)};
    Buffer from = in(x, DType::f32), ya = out({x.shape(0), x.shape(1)}, ops_->act()), yb = out({x.shape(0), x.shape(1)}, ops_->act());
    run(batch, [&] { ops_->norm_pair(ya.data, a, yb.data, b, from.floats(), parse_norm(kind), eps, int(x.shape(1))); });
    return py::make_tuple(read(ya), read(yb));
  }

  Floats linear(const py::dict& batch, const Floats& x, const py::object& weight, const std::string& format, const MaybeFloats& bias,
                const std::optional<std::string>& activation, const std::string& rows) {
    const Linear w{matrix(weight, format), vector(bias)};
    const Activation act = parse_activation(activation.value_or("relu"));
    Buffer from = in(x, ops_->act()), y = out({x.shape(0), w.weight.rows}, ops_->act());
    run(batch, [&] { ops_->linear(y.data, from.data, w, activation ? &act : nullptr, parse_rows(rows)); });
    return read(y);
  }

  Floats linear_add(const py::dict& batch, const Floats& y, const Floats& x, const py::object& weight, const std::string& format,
                    const MaybeFloats& bias, bool add_bias) {
    const Linear w{matrix(weight, format), vector(bias)};
    Buffer from = in(x, ops_->act()), to = in(y, DType::f32);
    run(batch, [&] { ops_->linear_add(to.floats(), from.data, w, add_bias); });
    return read(to);
  }

  py::tuple linear_pair(const py::dict& batch, const Floats& xa, const py::object& wa, const Floats& xb, const py::object& wb, const std::string& format,
                        const MaybeFloats& bias_a, const MaybeFloats& bias_b, const std::optional<std::string>& activation, bool decode_b) {
    const Linear a{matrix(wa, format), vector(bias_a)}, b{matrix(wb, format), vector(bias_b)};
    const Activation act = parse_activation(activation.value_or("relu"));
    Buffer from_a = in(xa, ops_->act()), from_b = in(xb, ops_->act());
    Buffer ya = out({xa.shape(0), a.weight.rows}, ops_->act()), yb = out({xb.shape(0), b.weight.rows}, ops_->act());
    run(batch, [&] { ops_->linear_pair(ya.data, from_a.data, a, nullptr, yb.data, from_b.data, b, activation ? &act : nullptr, decode_b); });
    return py::make_tuple(read(ya), read(yb));
  }

  Floats linear_add_pair(const py::dict& batch, const Floats& y, const Floats& xa, const py::object& wa, const Floats& xb, const py::object& wb,
                         const std::string& format, const MaybeFloats& bias_a, const MaybeFloats& bias_b, bool add_bias) {
    const Linear a{matrix(wa, format), vector(bias_a)}, b{matrix(wb, format), vector(bias_b)};
    Buffer from_a = in(xa, ops_->act()), from_b = in(xb, ops_->act()), to = in(y, DType::f32);
    run(batch, [&] { ops_->linear_add_pair(to.floats(), from_a.data, a, from_b.data, b, add_bias); });
    return read(to);
  }

  Floats logits(const py::dict& batch, const Floats& x, const py::object& weight, const std::string& format, const MaybeFloats& bias) {
    const Linear w{matrix(weight, format), vector(bias)};
    Buffer from = in(x, ops_->act()), y = out({x.shape(0), w.weight.rows}, DType::f32);
    run(batch, [&] { ops_->logits(y.floats(), from.data, w); });
    return read(y);
  }

  Floats gate(const py::dict& batch, const Floats& g, const Floats& up, const std::string& activation, bool in_place) {
    Buffer a = in(g, ops_->act()), b = in(up, ops_->act()), y = in_place ? b : out({g.shape(0), g.shape(1)}, ops_->act());
    run(batch, [&] { ops_->gate(y.data, a.data, b.data, parse_activation(activation), int(g.shape(1))); });
    return read(y);
  }

  // k, v: [layers, pages, kv_heads, kPageTokens, D] before; returns k, v after
  py::tuple copy_pages(const py::dict& batch, const Floats& k, const Floats& v, int kv_heads) {
    Buffer kb = in(k, ops_->act()), vb = in(v, ops_->act());
    const size_t layer = kb.bytes() / size_t(k.shape(0));
    std::vector<KvLayer> layers;
    for (size_t i = 0; i < size_t(k.shape(0)); ++i) layers.push_back({static_cast<char*>(kb.data) + i * layer, static_cast<char*>(vb.data) + i * layer});
    run(batch, [&] { ops_->copy_pages(layers, config_, kv_heads); });
    return py::make_tuple(read(kb), read(vb));
  }

  // k, v: [pages, kv_heads, kPageTokens, D] before; returns qkv, k, v after
  py::tuple rope_store(const py::dict& batch, const Floats& qkv, const Floats& k, const Floats& v, int heads, int kv_heads) {
    Buffer x = in(qkv, ops_->act()), kb = in(k, ops_->act()), vb = in(v, ops_->act());
    run(batch, [&] { ops_->rope_store(x.data, {kb.data, vb.data}, config_, heads, kv_heads); });
    return py::make_tuple(read(x), read(kb), read(vb));
  }

  Floats attention(const py::dict& batch, const Floats& qkv, const Floats& k, const Floats& v, int heads, int kv_heads) {
    Buffer x = in(qkv, ops_->act()), kb = in(k, ops_->act()), vb = in(v, ops_->act());
    Buffer y = out({qkv.shape(0), heads * config_.head_dim}, ops_->act());
    run(batch, [&] { ops_->attention(y.data, x.data, {kb.data, vb.data}, config_, heads, kv_heads); });
    return read(y);
  }

  // returns out, and k, v after
  py::tuple rope_attention(const py::dict& batch, const Floats& qkv, const Floats& k, const Floats& v, int heads, int kv_heads) {
    Buffer x = in(qkv, ops_->act()), kb = in(k, ops_->act()), vb = in(v, ops_->act());
    Buffer y = out({qkv.shape(0), heads * config_.head_dim}, ops_->act());
    run(batch, [&] { ops_->rope_attention(y.data, x.data, {kb.data, vb.data}, config_, heads, kv_heads); });
    return py::make_tuple(read(y), read(kb), read(vb));
  }

  Floats take_columns(const py::dict& batch, const Floats& x, const py::array_t<int32_t>& order) {
    if (x.ndim() != 2 || order.ndim() != 1 || x.shape(1) != order.size()) throw ValueError("order: expected one index per column of x");
    for (py::ssize_t i = 0; i < order.size(); ++i)
      if (order.at(i) < 0 || order.at(i) >= x.shape(1)) throw ValueError("order: expected columns of x");
    void* indices = ops_->alloc(size_t(order.size()) * sizeof(int32_t));
    ops_->upload(indices, order.data(), size_t(order.size()) * sizeof(int32_t));
    Buffer from = in(x, ops_->act()), y = out({rows(batch), x.shape(1)}, ops_->act());
    run(batch, [&] { ops_->take_columns(y.data, from.data, static_cast<const int32_t*>(indices), x.shape(1)); });
    return read(y);
  }

  Floats gather_logit_rows(const py::dict& batch, const Floats& x) {
    const Batch b = to_batch(batch);
    Buffer from = in(x, DType::f32), y = out({b.samples(), x.shape(1)}, DType::f32);
    run(batch, [&] { ops_->gather_logit_rows(y.floats(), from.floats(), int(x.shape(1))); });
    return read(y);
  }

  // returns whether there are fewer rows then, how many, those of x in float32 and in the compute dtype, and the sampled ones
  py::tuple keep_sampled(const py::dict& batch, const Floats& x) {
    const Batch b = to_batch(batch);
    const std::optional<KeptRows> kept = kept_rows(b);
    Buffer wide = in(x, DType::f32), narrow = in(x, ops_->act());
    const py::ssize_t n = kept ? py::ssize_t(kept->from.size()) : b.rows();
    Buffer y = out({n, x.shape(1)}, DType::f32), z = out({n, x.shape(1)}, ops_->act()), s = out({b.samples(), x.shape(1)}, DType::f32);
    bool fewer = false;
    int rows = 0;
    run(batch, [&] {
      fewer = ops_->keep_sampled();
      rows = ops_->rows();
      if (fewer) {
        ops_->take_kept(y.data, wide.data, size_t(x.shape(1)) * sizeof(float));
        ops_->take_kept(z.data, narrow.data, size_t(x.shape(1)) * size_of(ops_->act()));
      }
      if (rows > 0) ops_->gather_logit_rows(s.floats(), fewer ? y.floats() : wide.floats(), int(x.shape(1)));
    });
    return py::make_tuple(fewer, rows, read(y), read(z), read(s));
  }

  py::tuple sample(const py::dict& batch, const Floats& logits) {
    const Batch b = to_batch(batch);
    if (logits.ndim() != 2 || logits.shape(0) != b.samples()) throw ValueError("logits: expected [samples, vocab]");
    Buffer from = in(logits, DType::f32);
    ops_->step(b, 0, [&] { ops_->sample(from.floats(), int(logits.shape(1))); });
    sampled_ = ops_->collect(0);
    return py::make_tuple(py::array_t<int32_t>(py::ssize_t(sampled_.token.size()), sampled_.token.data()),
                          py::array_t<float>(py::ssize_t(sampled_.logprob.size()), sampled_.logprob.data()));
  }

  // of the last sample(): [samples, TOP_TOKENS] tokens and log-probs, [0] when none were asked for
  py::tuple top_tokens() const {
    const std::vector<py::ssize_t> shape{py::ssize_t(sampled_.top_token.size() / kTopTokens), kTopTokens};
    py::array_t<int32_t> token(shape);
    Floats logprob(shape);
    std::copy(sampled_.top_token.begin(), sampled_.top_token.end(), token.mutable_data());
    std::copy(sampled_.top_logprob.begin(), sampled_.top_logprob.end(), logprob.mutable_data());
    return py::make_tuple(token, logprob);
  }

 private:
  struct Buffer {
    void* data = nullptr;
    std::vector<py::ssize_t> shape;
    DType dtype = DType::f32;
    float* floats() const { return static_cast<float*>(data); }
    size_t bytes() const {
      size_t n = size_of(dtype);
      for (auto d : shape) n *= size_t(d);
      return n;
    }
  };

  Buffer guarded(std::vector<py::ssize_t> shape, DType dtype, const void* content) {
    Buffer b{nullptr, std::move(shape), dtype};
    std::string all(b.bytes() + 2 * kGuard, '\xA5');
    if (content) {
      std::memcpy(all.data() + kGuard, content, b.bytes());
    } else {
      std::memset(all.data() + kGuard, 0xFF, b.bytes());  // NaN: what an op leaves out shows
    }
    char* base = static_cast<char*>(ops_->alloc(all.size()));
    ops_->upload(base, all.data(), all.size());
    b.data = base + kGuard;
    return b;
  }
  Buffer in(const Floats& a, DType dtype) { return guarded({a.shape(), a.shape() + a.ndim()}, dtype, packed(a, dtype).data()); }
  Buffer out(std::vector<py::ssize_t> shape, DType dtype) { return guarded(std::move(shape), dtype, nullptr); }

  Floats read(const Buffer& b) {
    std::string all(b.bytes() + 2 * kGuard, '\0');
    ops_->download(all.data(), static_cast<char*>(b.data) - kGuard, all.size());
    const std::string guard(kGuard, '\xA5');
    if (all.compare(0, kGuard, guard) != 0 || all.compare(all.size() - kGuard, kGuard, guard) != 0)
      throw std::runtime_error("the op wrote outside its output");
    Floats result(b.shape);
    HostMatrix m;
    m.format = b.dtype == DType::f32 ? Format::f32 : b.dtype == DType::f16 ? Format::f16 : Format::bf16;
    m.rows = 1;
    m.cols = result.size();
    m.data = reinterpret_cast<const uint8_t*>(all.data()) + kGuard;
    decode_row(m, 0, result.mutable_data());
    return result;
  }

  static Rows parse_rows(const std::string& rows) {
    if (rows == "all") return Rows::all;
    if (rows == "decode") return Rows::decode;
    if (rows == "prefill") return Rows::prefill;
    throw ValueError(cat("rows is '", rows, "'; expected all, decode or prefill"));
  }

  Matrix matrix(const py::object& weight, const std::string& format) {
    const Matrix m = ops_->load_matrix({host_matrix(format, weight)});
    ops_->finish_loading();
    return m;
  }

  const float* vector(const MaybeFloats& v) {
    if (!v) return nullptr;
    HostMatrix m;
    m.rows = 1;
    m.cols = v->size();
    m.stride = size_t(v->size()) * 4;
    m.data = reinterpret_cast<const uint8_t*>(v->data());
    const float* const out = ops_->load_vector(m);
    ops_->finish_loading();
    return out;
  }

  py::ssize_t rows(const py::dict& batch) { return to_batch(batch).rows(); }

  void run(const py::dict& batch, const std::function<void()>& body) {
    const Batch b = to_batch(batch);
    ops_->step(b, 0, body);
    ops_->collect(0);
  }

  std::unique_ptr<Ops> ops_;
  ModelConfig config_;
  Limits limits_;
  Sampled sampled_;
};

}  // namespace

void bind_testing_ops(py::module_& m) {
  using namespace py::literals;
  m.def("cpu_kernels", &cpu_kernels, "Instruction sets that the CPU ops can use here, best first.");

  py::class_<TestOps>(m, "Ops")
      .def(py::init<const std::string&, const std::string&, int, const std::string&, int>(), "device"_a = "cpu", "dtype"_a = "auto",
           "threads"_a = 0, "kernels"_a = "", "shared_max"_a = 0)
      .def_property_readonly("device", &TestOps::device)
      .def_property_readonly("dtype", &TestOps::dtype)
      .def_property_readonly("free_memory", &TestOps::free_memory)
      .def("plan", &TestOps::plan, "config"_a, "slots"_a, "rows"_a, "max_len"_a, "pages"_a)
      .def("embed", &TestOps::embed, "batch"_a, "table"_a, "format"_a = "f32")
      .def("read_matrix", &TestOps::read_matrix, "weight"_a, "format"_a, "parts"_a = std::vector<int64_t>())
      .def("add_position", &TestOps::add_position, "batch"_a, "x"_a, "table"_a, "format"_a = "f32")
      .def("norm_pair", &TestOps::norm_pair, "batch"_a, "x"_a, "weight_a"_a, "bias_a"_a, "weight_b"_a, "bias_b"_a, "kind"_a = "layer", "eps"_a = 1e-5f)
      .def("norm", &TestOps::norm, "batch"_a, "x"_a, "weight"_a, "bias"_a = py::none(), "kind"_a = "layer", "eps"_a = 1e-5f,
           "logit_rows"_a = false)
      .def("linear", &TestOps::linear, "batch"_a, "x"_a, "weight"_a, "format"_a = "f32", "bias"_a = py::none(),
           "activation"_a = py::none(), "rows"_a = "all")
      .def("linear_pair", &TestOps::linear_pair, "batch"_a, "xa"_a, "wa"_a, "xb"_a, "wb"_a, "format"_a = "f32", "bias_a"_a = py::none(),
           "bias_b"_a = py::none(), "activation"_a = py::none(), "decode_b"_a = false)
      .def("linear_add_pair", &TestOps::linear_add_pair, "batch"_a, "y"_a, "xa"_a, "wa"_a, "xb"_a, "wb"_a, "format"_a = "f32",
           "bias_a"_a = py::none(), "bias_b"_a = py::none(), "add_bias"_a = true)
      .def("linear_add", &TestOps::linear_add, "batch"_a, "y"_a, "x"_a, "weight"_a, "format"_a = "f32", "bias"_a = py::none(),
           "add_bias"_a = true)
      .def("logits", &TestOps::logits, "batch"_a, "x"_a, "weight"_a, "format"_a = "f32", "bias"_a = py::none())
      .def("gate", &TestOps::gate, "batch"_a, "gate"_a, "up"_a, "activation"_a, "in_place"_a = false)
      .def("copy_pages", &TestOps::copy_pages, "batch"_a, "k"_a, "v"_a, "kv_heads"_a)
      .def("rope_store", &TestOps::rope_store, "batch"_a, "qkv"_a, "k"_a, "v"_a, "heads"_a, "kv_heads"_a)
      .def("attention", &TestOps::attention, "batch"_a, "qkv"_a, "k"_a, "v"_a, "heads"_a, "kv_heads"_a)
      .def("rope_attention", &TestOps::rope_attention, "batch"_a, "qkv"_a, "k"_a, "v"_a, "heads"_a, "kv_heads"_a)
      .def("take_columns", &TestOps::take_columns, "batch"_a, "x"_a, "order"_a)
      .def("gather_logit_rows", &TestOps::gather_logit_rows, "batch"_a, "x"_a)
      .def("keep_sampled", &TestOps::keep_sampled, "batch"_a, "x"_a)
      .def("sample", &TestOps::sample, "batch"_a, "logits"_a)
      .def_property_readonly("top_tokens", &TestOps::top_tokens);
}
