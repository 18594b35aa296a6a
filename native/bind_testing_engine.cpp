// An Engine over the fake runner, or over a real one, whose steps a test can hold back.
#include <pybind11/stl.h>

#include <condition_variable>
#include <mutex>

#include "bind_testing.h"
#include "engine/engine.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

// Launches as many steps as a test allows: what is submitted while that is none runs together afterwards.
class HeldRunner final : public Runner {
 public:
  explicit HeldRunner(std::unique_ptr<Runner> inner) : inner_(std::move(inner)) {}

  const ModelConfig& config() const override { return inner_->config(); }
  const Limits& limits() const override { return inner_->limits(); }
  std::string device() const override { return inner_->device(); }
  std::string dtype() const override { return inner_->dtype(); }
  int64_t weight_bytes() const override { return inner_->weight_bytes(); }
  bool rows_alike() const override { return inner_->rows_alike(); }
  LoadStats load_stats() const override { return inner_->load_stats(); }
  void launch(const Batch& batch, int ticket) override {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return allowed_ != 0; });
      if (allowed_ > 0) --allowed_;
    }
    inner_->launch(batch, ticket);
  }
  Sampled collect(int ticket) override { return inner_->collect(ticket); }
  std::vector<float> logits(const Batch& batch) override { return inner_->logits(batch); }

  void allow(int steps) const {
    std::lock_guard<std::mutex> lock(mutex_);
    allowed_ = steps;
    changed_.notify_all();
  }
  const Runner& inner() const { return *inner_; }

 private:
  const std::unique_ptr<Runner> inner_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  mutable int allowed_ = -1;  // -1: any number; mutable because an Engine gives its runner as const
};

const HeldRunner& held(const Engine& e) {
  if (auto* runner = dynamic_cast<const HeldRunner*>(&e.runner())) return *runner;
  throw ValueError("engine is not of fake_engine() or held_engine()");
}

}  // namespace

void bind_testing_engine(py::module_& m) {
  m.def("fake_engine", [](int slots, int prefill_tokens, int max_len, int pages, int queue, int vocab, TokenBytes token_bytes,
                          const std::string& device, int depth, int fail_launch, int fail_collect, int64_t step_us, int64_t launch_us, bool rows_alike,
                          const std::string& prefix_cache, const std::vector<int32_t>& never_text) {
    auto runner = make_fake_runner({slots, prefill_tokens + slots, max_len, pages}, vocab, device, {fail_launch, fail_collect, step_us, launch_us, rows_alike});
    return std::make_unique<Engine>(std::make_unique<HeldRunner>(std::move(runner)), std::move(token_bytes), never_text,
                                    EngineOptions{prefill_tokens, queue, depth, prefix_cache});
  }, py::kw_only(), py::arg("slots") = 4, py::arg("prefill_tokens") = 16, py::arg("max_len") = 256, py::arg("pages") = 32, py::arg("queue") = 16,
     py::arg("vocab") = 64, py::arg("token_bytes") = TokenBytes(), py::arg("device") = "fake", py::arg("depth") = 0,
     py::arg("fail_launch") = -1, py::arg("fail_collect") = -1, py::arg("step_us") = 0, py::arg("launch_us") = 0, py::arg("rows_alike") = false,
     py::arg("prefix_cache") = "on", py::arg("never_text") = std::vector<int32_t>());

  m.def("held_engine", [](const std::string& weights, TokenBytes token_bytes, const std::string& device, const std::string& dtype, int tensor_parallel,
                          int slots, int prefill_tokens, int max_len, int64_t kv_bytes, int threads, int depth, const std::string& prefix_cache) {
    RunnerOptions o;
    o.weights = weights, o.device = device, o.dtype = dtype, o.tensor_parallel = tensor_parallel;
    o.slots = slots, o.prefill_rows = prefill_tokens, o.max_len = max_len, o.kv_bytes = kv_bytes, o.threads = threads;
    py::gil_scoped_release unlocked;
    return std::make_unique<Engine>(std::make_unique<HeldRunner>(load_runner(o)), std::move(token_bytes), std::vector<int32_t>(),
                                    EngineOptions{prefill_tokens, 256, depth, prefix_cache});
  }, py::arg("weights"), py::arg("token_bytes"), py::kw_only(), py::arg("device") = "auto", py::arg("dtype") = "auto", py::arg("tensor_parallel") = 1,
     py::arg("slots") = 16, py::arg("prefill_tokens") = 512, py::arg("max_len") = 0, py::arg("kv_bytes") = 0, py::arg("threads") = 0,
     py::arg("depth") = 0, py::arg("prefix_cache") = "on");

  m.def("allow", [](const Engine& e, int steps) { held(e).allow(steps); }, py::arg("engine"), py::arg("steps"), "So many steps from now on; -1: any number.");
  m.def("bubbles", [](const Engine& e) { return fake_bubbles(held(e).inner()); });
}
