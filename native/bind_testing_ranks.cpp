// The exchanges between ranks with numpy arrays, for tests/test_ranks.py and tools/bench_kernels.py.
#include <pybind11/stl.h>

#include <chrono>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "bind_testing.h"
#include "core/check.h"
#include "model/thread_comm.h"
#include "ops/comm.h"
#include "ops/ops.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

class TestRanks {
 public:
  TestRanks(const std::string& device, int world) {
    if (world < 2) throw ValueError(cat("world is ", world, "; expected 2 or more"));
    for (int r = 0; r < world; ++r) ops_.push_back(make_ops(rank_device(device, r, world), "float32", DType::f32, 1));
    if (ops_[0]->device() == "cpu")
      group_ = std::make_unique<ThreadGroup>(world);
    else
      group_ = make_device_group(device, world);
    for (int r = 0; r < world; ++r) comms_.push_back(group_->join(r, *ops_[size_t(r)]));
  }

  // y [world, n], data [world, k, n]: k exchanges one behind the other. y and data afterwards. absent: a rank that does not come, -1: none.
  py::tuple add_sums(const Floats& y, const Floats& data, int absent) {
    const int world = int(ops_.size());
    if (y.ndim() != 2 || data.ndim() != 3 || y.shape(0) != world || data.shape(0) != world || data.shape(2) != y.shape(1))
      throw ValueError("expected y [world, n] and data [world, k, n]");
    const size_t k = size_t(data.shape(1)), n = size_t(y.shape(1)), stride = (n + 3) / 4 * 4;  // buffers begin at whole float4
    Floats y_after({py::ssize_t(world), py::ssize_t(n)}), data_after({py::ssize_t(world), py::ssize_t(k), py::ssize_t(n)});
    std::vector<float*> to, from;
    for (int r = 0; r < world; ++r) {
      to.push_back(put(r, y.data(r, 0), n));
      from.push_back(put(r, nullptr, k * stride));
      for (size_t i = 0; i < k; ++i) ops_[size_t(r)]->upload(from.back() + i * stride, data.data(r, py::ssize_t(i), 0), n * sizeof(float));
    }
    float *y_out = y_after.mutable_data(), *data_out = data_after.mutable_data();
    run(absent, [&](int r) {
      for (size_t i = 0; i < k; ++i) comms_[size_t(r)]->add_sum(to[size_t(r)], from[size_t(r)] + i * stride, int64_t(n));
    });
    for (int r = 0; r < world; ++r) {
      get(r, y_out + size_t(r) * n, to[size_t(r)], n);
      for (size_t i = 0; i < k; ++i) get(r, data_out + (size_t(r) * k + i) * n, from[size_t(r)] + i * stride, n);
    }
    group_->check();
    return py::make_tuple(y_after, data_after);
  }

  // parts: of each rank [k, rows, its columns of total]. What every rank has then: [world, k, rows, total]
  Floats gather_columns(const std::vector<Floats>& parts, int64_t total) {
    const int world = int(ops_.size());
    if (int(parts.size()) != world) throw ValueError("expected the columns of every rank");
    const size_t k = size_t(parts[0].shape(0)), rows = size_t(parts[0].shape(1)), all = rows * size_t(total);
    Floats out({py::ssize_t(world), py::ssize_t(k), py::ssize_t(rows), py::ssize_t(total)});
    std::vector<float*> to, from;
    std::vector<size_t> stride;
    for (int r = 0; r < world; ++r) {
      const Floats& part = parts[size_t(r)];
      const int64_t columns = share_begin(total, r + 1, world) - share_begin(total, r, world);
      if (part.ndim() != 3 || size_t(part.shape(0)) != k || size_t(part.shape(1)) != rows || part.shape(2) != columns)
        throw ValueError(cat("parts of rank ", r, ": expected [k, rows, ", columns, "]"));
      const size_t n = rows * size_t(columns);
      stride.push_back((n + 3) / 4 * 4);
      from.push_back(put(r, nullptr, k * stride.back()));
      for (size_t i = 0; i < k; ++i) ops_[size_t(r)]->upload(from.back() + i * stride.back(), part.data(py::ssize_t(i), 0, 0), n * sizeof(float));
      to.push_back(put(r, nullptr, k * all));
    }
    float* const result = out.mutable_data();
    run(-1, [&](int r) {
      const size_t i = size_t(r);
      for (size_t j = 0; j < k; ++j) comms_[i]->all_gather_columns(to[i] + j * all, from[i] + j * stride[i], int64_t(rows), total);
    });
    for (int r = 0; r < world; ++r) get(r, result + size_t(r) * k * all, to[size_t(r)], k * all);
    group_->check();
    return out;
  }

  // Seconds that a sum over ranks of n floats takes, on average of `repeats` one behind the other, after as many that are not counted.
  double time_sums(int64_t n, int repeats) {
    if (n < 1 || repeats < 1) throw ValueError(cat("n is ", n, " and repeats ", repeats, "; expected 1 or more"));
    std::vector<float*> to, from;
    for (int r = 0; r < int(ops_.size()); ++r) to.push_back(put(r, nullptr, size_t(n))), from.push_back(put(r, nullptr, size_t(n)));
    const auto all = [&] {
      const auto start = std::chrono::steady_clock::now();
      run(-1, [&](int r) {
        float last;
        for (int i = 0; i < repeats; ++i) comms_[size_t(r)]->add_sum(to[size_t(r)], from[size_t(r)], n);
        get(r, &last, to[size_t(r)], 1);
      });
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    all();
    const double seconds = all();
    group_->check();
    return seconds / repeats;
  }

 private:
  float* put(int r, const float* values, size_t n) {
    float* const p = static_cast<float*>(ops_[size_t(r)]->alloc(n * sizeof(float)));
    if (values) ops_[size_t(r)]->upload(p, values, n * sizeof(float));
    return p;
  }
  void get(int r, float* values, const float* p, size_t n) { ops_[size_t(r)]->download(values, p, n * sizeof(float)); }

  // f on a thread of each rank; who is absent leaves the others to wait until the group is told.
  void run(int absent, const std::function<void(int)>& f) {
    py::gil_scoped_release unlocked;
    std::exception_ptr error;
    std::mutex mutex;
    std::vector<std::thread> threads;
    group_->begin();
    for (int r = 0; r < int(ops_.size()); ++r)
      if (r != absent)
        threads.emplace_back([&, r] {
          try {
            f(r);
          } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
            group_->abort();
          }
        });
    if (absent >= 0) group_->abort();
    for (auto& t : threads) t.join();
    if (error) std::rethrow_exception(error);
  }

  std::unique_ptr<CommGroup> group_;
  std::vector<std::unique_ptr<Ops>> ops_;
  std::vector<std::unique_ptr<Comm>> comms_;
};

}  // namespace

void bind_testing_ranks(py::module_& m) {
  using namespace py::literals;
  py::class_<TestRanks>(m, "Ranks")
      .def(py::init<const std::string&, int>(), "device"_a, "world"_a)
      .def("add_sums", &TestRanks::add_sums, "y"_a, "data"_a, "absent"_a = -1)
      .def("time_sums", &TestRanks::time_sums, "n"_a, "repeats"_a = 1000)
      .def("gather_columns", &TestRanks::gather_columns, "parts"_a, "total"_a);
}
