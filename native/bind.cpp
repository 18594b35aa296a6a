// Python module codefuse_triton._native. Its stub is backend_src/codefuse_triton/_native.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <random>

#include "engine/engine.h"
#include "ops/bandwidth.h"
#include "ops/ops.h"

namespace py = pybind11;
using namespace codefuse;

void bind_formats(py::module_& m);  // bind_formats.cpp
void bind_testing(py::module_& m);  // bind_testing.cpp

namespace {

template <class T>
py::array_t<T> to_array(const std::vector<T>& v) {
  return py::array_t<T>(py::ssize_t(v.size()), v.data());
}

template <class T>
py::array_t<T> to_rows(const std::vector<T>& v, int columns) {
  const py::ssize_t rows = columns > 0 ? py::ssize_t(v.size()) / columns : 0;
  return py::array_t<T>({rows, py::ssize_t(columns)}, v.data());
}

std::vector<std::string> to_strings(const std::vector<py::bytes>& v) { return {v.begin(), v.end()}; }

unsigned to_stop_at(const std::vector<std::string>& names) {
  unsigned at = 0;
  for (const std::string& name : names) {
    const auto found = std::find(std::begin(kStopAtNames), std::end(kStopAtNames), name);
    if (found == std::end(kStopAtNames)) throw ValueError(cat("stop_at is '", name, "'; expected any of line, block, bracket, suffix, repetition"));
    at |= 1u << (found - std::begin(kStopAtNames));
  }
  return at;
}

uint64_t random_seed() {
  std::random_device device;
  return uint64_t(device()) << 32 | device();
}

// A wait of the main thread is cut into slices so that Ctrl-C is seen.
py::typing::List<Output> poll(Outbox& box, std::optional<double> timeout_s) {
  static const auto main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  const double forever = std::numeric_limits<double>::infinity();
  const double slice = PyThread_get_thread_ident() == main_thread ? 0.1 : forever;
  double left = timeout_s ? std::max(0.0, *timeout_s) : forever;
  std::vector<Output> outputs;
  while (true) {
    const double wait = std::min(left, slice);
    {
      py::gil_scoped_release unlocked;
      outputs = box.poll(wait == forever ? -1 : wait);
    }
    left -= wait;
    if (!outputs.empty() || box.closed() || !(left > 0)) break;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  py::typing::List<Output> out;
  for (Output& o : outputs) out.append(py::cast(std::move(o)));
  return out;
}

py::typing::Dict<py::str, py::float_> load_stats(const Engine& engine) {
  const LoadStats s = engine.runner().load_stats();
  py::typing::Dict<py::str, py::float_> d;
  d["device_s"] = s.device_s;
  d["weights_s"] = s.weights_s;
  d["verified_s"] = s.verified_s;
  d["total_s"] = s.total_s;
  d["weight_bytes"] = double(s.weight_bytes);
  d["verified_bytes"] = double(s.verified_bytes);
  return d;
}

py::typing::Dict<py::str, py::object> stats(const Engine& engine) {
  const EngineStats s = engine.stats();
  py::dict finished;
  for (Finish f : {Finish::eos, Finish::stop, Finish::length, Finish::time, Finish::cancelled, Finish::error, Finish::deadline})
    finished[name_of(f)] = s.finished[size_t(f)];
  py::typing::Dict<py::str, py::object> d;
  d["running"] = s.running;
  d["waiting"] = s.waiting;
  d["slots"] = s.slots;
  d["queue"] = s.queue;
  d["pages"] = s.pages;
  d["free_pages"] = s.free_pages;
  d["cached_pages"] = s.cached_pages;
  d["page_tokens"] = kPageTokens;
  d["steps"] = s.steps;
  d["step_s"] = s.step_s;
  d["prefill_tokens"] = s.prefill_tokens;
  d["decode_tokens"] = s.decode_tokens;
  d["cached_tokens"] = s.cached_tokens;
  d["wasted_rows"] = s.wasted_rows;
  d["preemptions"] = s.preemptions;
  d["evictions"] = s.evictions;
  d["submitted"] = s.submitted;
  d["refused"] = s.refused;
  d["finished"] = finished;
  d["error"] = s.error;
  return d;
}

std::unique_ptr<Engine> make_engine(const std::string& weights, const std::vector<py::bytes>& token_bytes, const std::vector<int32_t>& never_text,
                                    const std::string& device,
                                    const std::string& dtype, int tensor_parallel, int slots, int prefill_tokens, int max_len, int64_t kv_bytes,
                                    int queue, int threads, int depth, const std::string& prefix_cache) {
  if (prefill_tokens < 1 || prefill_tokens > 65536) throw ValueError(cat("prefill_tokens is ", prefill_tokens, "; expected 1..65536"));
  const EngineOptions engine_options{prefill_tokens, queue, depth, prefix_cache};
  Engine::check(engine_options);
  RunnerOptions options;
  options.weights = weights;
  options.device = device;
  options.dtype = dtype;
  options.tensor_parallel = tensor_parallel;
  options.slots = slots;
  options.prefill_rows = prefill_tokens;
  options.max_len = max_len;
  options.kv_bytes = kv_bytes;
  options.threads = threads;
  TokenBytes table = to_strings(token_bytes);
  py::gil_scoped_release unlocked;
  return std::make_unique<Engine>(load_runner(options), std::move(table), never_text, engine_options);
}

int64_t submit(Engine& engine, std::vector<int32_t> prompt, std::shared_ptr<Outbox> outbox, int max_tokens, float temperature, int top_k,
               float top_p, float min_p, std::optional<uint64_t> seed, const std::vector<std::pair<int32_t, float>>& logit_bias,
               float repetition_penalty, float presence_penalty, float frequency_penalty, const std::vector<py::bytes>& bad_words,
               const std::vector<py::bytes>& stop, bool include_stop,
               std::vector<int32_t> eos_ids, int min_tokens, bool stream, bool logprobs, int top_logprobs, const py::bytes& cache_salt, int beam_width, int beam_count,
               float length_penalty, float beam_diversity_rate, bool early_stopping,
               const std::vector<std::string>& stop_at, int max_time_ms,
               const py::bytes& prefix_bytes, bool include_typed, const py::bytes& before, const py::bytes& after, std::vector<int32_t> prefix_ids,
               std::pair<int, int> truncated_tokens, const py::bytes& session, int64_t beside, int deadline_ms) {
  Request r;
  r.prompt = std::move(prompt);
  r.max_tokens = max_tokens;
  r.sample = {temperature, top_k, top_p, min_p, seed ? *seed : random_seed(), top_logprobs};
  r.logit_bias = logit_bias;
  r.penalties = {repetition_penalty, presence_penalty, frequency_penalty};
  r.bad_words = to_strings(bad_words);
  r.stop = to_strings(stop);
  r.include_stop = include_stop;
  r.eos_ids = std::move(eos_ids);
  r.min_tokens = min_tokens;
  r.beams = {beam_width, beam_count, length_penalty, beam_diversity_rate, early_stopping};
  r.stream = stream;
  r.logprobs = logprobs;
  r.cache_salt = cache_salt;
  r.stop_at = to_stop_at(stop_at);
  r.max_time_ms = max_time_ms;
  r.prefix = prefix_bytes;
  r.include_typed = include_typed;
  r.before = before;
  r.after = after;
  r.prefix_ids = std::move(prefix_ids);
  r.truncated_tokens = {truncated_tokens.first, truncated_tokens.second};
  r.session = session;
  r.beside = beside;
  r.deadline_ms = deadline_ms;
  r.outbox = std::move(outbox);
  py::gil_scoped_release unlocked;
  return engine.submit(std::move(r));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled engine of codefuse_triton.";
  py::register_exception<LoadError>(m, "LoadError", PyExc_RuntimeError);
  py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);
  py::register_exception<QueueFull>(m, "QueueFull", PyExc_RuntimeError);

  m.def("check_device", &check_device, py::arg("device"));
  m.def("devices", [] {
    const Devices d = devices();
    std::vector<std::string> names;
    std::stringstream in(d.names);
    for (std::string name; std::getline(in, name, ',');) names.push_back(name);
    return py::make_tuple(names, d.why_no_cuda);
  }, "Devices of this build and machine, and why CUDA is not among them (or '').");

  m.def("read_bandwidth", &read_bandwidth, py::arg("device"), py::arg("threads") = 0, py::call_guard<py::gil_scoped_release>(),
        "Bytes per second that `device` can read, measured now: the limit of a decode step.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
        "Bytes per second of a large copy from pinned memory to a CUDA device, measured now: the limit of loading.");

  py::class_<Output>(m, "Chunk", "New output of one request.")
      .def_readonly("uid", &Output::uid)
      .def_readonly("index", &Output::index)
      .def_property_readonly("token_ids", [](const Output& o) { return to_array(o.tokens); })
      .def_property_readonly("logprobs", [](const Output& o) { return to_array(o.logprobs); })
      .def_property_readonly("top_token_ids", [](const Output& o) { return to_rows(o.top.tokens, o.top_per_token); })
      .def_property_readonly("top_logprobs", [](const Output& o) { return to_rows(o.top.logprobs, o.top_per_token); })
      .def_property_readonly("text", [](const Output& o) { return py::bytes(o.text); })
      .def_readonly("text_start", &Output::text_start)
      .def_property_readonly("text_bytes", [](const Output& o) { return o.text.size(); })
      .def_property_readonly("finish_reason", [](const Output& o) { return name_of(o.finish); })
      .def_property_readonly("stop_reason", [](const Output& o) { return py::str(py::bytes(o.stop).attr("decode")("utf-8", "replace")); })
      .def_readonly("error", &Output::error)
      .def_readonly("num_input_tokens", &Output::input_tokens)
      .def_property_readonly("num_truncated_tokens", [](const Output& o) { return std::make_pair(o.truncated_tokens[0], o.truncated_tokens[1]); })
      .def_readonly("num_output_tokens", &Output::output_tokens)
      .def_readonly("num_cached_tokens", &Output::cached_tokens)
      .def_readonly("cum_logprob", &Output::cum_logprob)
      .def_readonly("queue_s", &Output::queue_s)
      .def_readonly("prefill_s", &Output::prefill_s)
      .def_readonly("decode_s", &Output::decode_s)
      .def("__repr__", [](const Output& o) {
        return py::str("Chunk(uid={}, index={}, text={!r}, finish_reason={!r})").format(o.uid, o.index, py::bytes(o.text), name_of(o.finish));
      });

  py::class_<Outbox, std::shared_ptr<Outbox>>(m, "Outbox", "Where the output of any number of requests waits for its reader.")
      .def(py::init<>())
      .def("poll", &poll, py::arg("timeout_s") = py::none(),
           "All chunks that have arrived, at most one per request; waits for one for up to timeout_s seconds (None: for ever).")
      .def("close", &Outbox::close, "Wakes poll, which no longer waits; later chunks are dropped.")
      .def_property_readonly("closed", &Outbox::closed);

  py::class_<Engine>(m, "Engine", "The engine on token ids and bytes; codefuse_triton.Engine wraps it.")
      .def(py::init(&make_engine), py::arg("weights"), py::arg("token_bytes"), py::kw_only(), py::arg("never_text") = std::vector<int32_t>(),
           py::arg("device") = "auto",
           py::arg("dtype") = "auto", py::arg("tensor_parallel") = 1, py::arg("slots") = 16, py::arg("prefill_tokens") = 512,
           py::arg("max_len") = 0, py::arg("kv_bytes") = 0, py::arg("queue") = 256, py::arg("threads") = 0, py::arg("depth") = 0,
           py::arg("prefix_cache") = "on")
      .def("submit", &submit, py::arg("prompt"), py::arg("outbox"), py::kw_only(), py::arg("max_tokens") = 128,
           py::arg("temperature") = 0.0, py::arg("top_k") = 0, py::arg("top_p") = 1.0, py::arg("min_p") = 0.0,
           py::arg("seed") = py::none(), py::arg("logit_bias") = std::vector<std::pair<int32_t, float>>(), py::arg("repetition_penalty") = 1.0,
           py::arg("presence_penalty") = 0.0, py::arg("frequency_penalty") = 0.0, py::arg("bad_words") = py::typing::List<py::bytes>(), py::arg("stop") = py::typing::List<py::bytes>(), py::arg("include_stop") = false,
           py::arg("eos_ids") = std::vector<int32_t>(), py::arg("min_tokens") = 0, py::arg("stream") = true, py::arg("logprobs") = false,
           py::arg("top_logprobs") = 0, py::arg("cache_salt") = py::bytes(),
           py::arg("beam_width") = 1, py::arg("beam_count") = 1, py::arg("length_penalty") = 1.0, py::arg("beam_diversity_rate") = 0.0,
           py::arg("early_stopping") = false,
           py::arg("stop_at") = std::vector<std::string>(), py::arg("max_time_ms") = 0, py::arg("prefix_bytes") = py::bytes(),
           py::arg("include_typed") = false, py::arg("before") = py::bytes(), py::arg("after") = py::bytes(), py::arg("prefix_ids") = std::vector<int32_t>(),
           py::arg("truncated_tokens") = std::pair<int, int>(0, 0),
           py::arg("session") = py::bytes(), py::arg("beside") = 0, py::arg("deadline_ms") = 0,
           "Uid of the new request, the first of beam_count; its chunks go to outbox.")
      .def("cancel", &Engine::cancel, py::arg("uid"), py::call_guard<py::gil_scoped_release>(),
           "False when the request is unknown or has ended.")
      .def("stats", &stats)
      .def("close", &Engine::close, py::arg("drain_s") = 0.0, py::call_guard<py::gil_scoped_release>(),
           "Admits nothing more, waits up to drain_s seconds for the requests at hand, cancels the rest.")
      .def_property_readonly("device", [](const Engine& e) { return e.runner().device(); })
      .def_property_readonly("dtype", [](const Engine& e) { return e.runner().dtype(); })
      .def_property_readonly("max_len", [](const Engine& e) { return e.runner().limits().max_len; })
      .def_property_readonly("vocab", [](const Engine& e) { return e.runner().config().vocab; })
      .def_property_readonly("eos_ids", [](const Engine& e) { return e.runner().config().eos_ids; })
      .def_property_readonly("weight_bytes", [](const Engine& e) { return e.runner().weight_bytes(); })
      .def_property_readonly("load_stats", &load_stats);

  bind_formats(m);
  bind_testing(m);
}
