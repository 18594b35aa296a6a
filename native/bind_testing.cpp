// The module itself and a Runner without the engine, for tests/test_model.py and tools/evaluate.py.
#include "bind_testing.h"

#include <pybind11/stl.h>

#include <cstring>

namespace py = pybind11;
using namespace codefuse;

namespace {

py::tuple step(Runner& runner, const py::dict& batch, int ticket) {
  const Batch b = to_batch(batch);
  Sampled s;
  {
    py::gil_scoped_release unlocked;
    check_batch(b, runner.limits(), runner.config().vocab);
    runner.launch(b, ticket);
    s = runner.collect(ticket);
  }
  return py::make_tuple(py::array_t<int32_t>(py::ssize_t(s.token.size()), s.token.data()),
                        py::array_t<float>(py::ssize_t(s.logprob.size()), s.logprob.data()));
}

Floats runner_logits(Runner& runner, const py::dict& batch) {
  const Batch b = to_batch(batch);
  std::vector<float> values;
  {
    py::gil_scoped_release unlocked;
    check_batch(b, runner.limits(), runner.config().vocab);
    values = runner.logits(b);
  }
  Floats result({py::ssize_t(b.samples()), py::ssize_t(runner.config().vocab)});
  std::memcpy(result.mutable_data(), values.data(), values.size() * sizeof(float));
  return result;
}

std::unique_ptr<Runner> make_runner(const std::string& weights, const std::string& device, const std::string& dtype,
                                    int tensor_parallel, int slots, int prefill_rows, int max_len, int64_t kv_bytes, int threads) {
  RunnerOptions o;
  o.weights = weights;
  o.device = device;
  o.dtype = dtype;
  o.tensor_parallel = tensor_parallel;
  o.slots = slots;
  o.prefill_rows = prefill_rows;
  o.max_len = max_len;
  o.kv_bytes = kv_bytes;
  o.threads = threads;
  py::gil_scoped_release unlocked;
  return load_runner(o);
}

}  // namespace

void bind_testing(py::module_& module) {
  using namespace py::literals;
  py::module_ m = module.def_submodule("testing", "Ops and models without the engine, for tests and for tools that measure a model.");
  m.attr("PAGE_TOKENS") = kPageTokens;
  m.attr("DECODE_ROWS") = kDecodeRows;
  m.attr("LAST_TOKEN") = kLastToken;
  m.attr("TOP_TOKENS") = kTopTokens;
  bind_testing_ops(m);
  bind_testing_ranks(m);
  bind_testing_engine(m);
  bind_testing_scheduler(m);
  bind_testing_files(m);
  bind_testing_layers(m);
  bind_testing_text(m);

  py::class_<Runner>(m, "Runner")
      .def(py::init(&make_runner), "weights"_a, "device"_a = "cpu", "dtype"_a = "auto", "tensor_parallel"_a = 1, "slots"_a = 16,
           "prefill_rows"_a = 512, "max_len"_a = 0, "kv_bytes"_a = 0, "threads"_a = 0)
      .def_property_readonly("device", &Runner::device)
      .def_property_readonly("dtype", &Runner::dtype)
      .def_property_readonly("weight_bytes", &Runner::weight_bytes)
      .def_property_readonly("vocab", [](const Runner& r) { return r.config().vocab; })
      .def_property_readonly("slots", [](const Runner& r) { return r.limits().slots; })
      .def_property_readonly("rows", [](const Runner& r) { return r.limits().rows; })
      .def_property_readonly("max_len", [](const Runner& r) { return r.limits().max_len; })
      .def_property_readonly("pages", [](const Runner& r) { return r.limits().pages; })
      .def("step", &step, "batch"_a, "ticket"_a = 0, "Runs one step; tokens and log-probs of its samples.")
      .def("logits", &runner_logits, "batch"_a, "[samples, vocab] float32.");
}
