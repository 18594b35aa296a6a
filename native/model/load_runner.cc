// From options to a running model: limits, ranks and their threads.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

#include "core/checksums.h"
#include "model/fits.h"
#include "model/model.h"
#include "model/random_weights.h"
#include "model/runner.h"
#include "model/thread_comm.h"

namespace codefuse {

namespace {

// One persistent thread per rank; run(f) calls f(rank) on each and returns when all have. With one rank, on the caller's thread.
class Ranks {
 public:
  explicit Ranks(int world) : world_(world) {
    if (world > 1)
      for (int r = 0; r < world; ++r) threads_.emplace_back([this, r] { work(r); });
  }
  ~Ranks() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& t : threads_) t.join();
  }

  void share(CommGroup* group) { group_ = group; }  // which hears of a rank's error; nullptr: there is none yet

  // Rethrows the error of the rank that failed first of its own.
  void run(const std::function<void(int)>& f) {
    if (threads_.empty()) return f(0);
    std::unique_lock<std::mutex> lock(mutex_);
    if (group_) group_->begin();
    first_error_ = nullptr;
    job_ = &f;
    busy_ = world_;
    ++round_;
    wake_.notify_all();
    done_.wait(lock, [&] { return busy_ == 0; });
    if (first_error_) std::rethrow_exception(first_error_);
  }

 private:
  void work(int rank) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      lock.unlock();
      std::exception_ptr error;
      try {
        (*job_)(rank);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error && !first_error_) first_error_ = error;
      if (error && group_) group_->abort();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  const int world_;
  CommGroup* group_ = nullptr;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* job_ = nullptr;
  std::exception_ptr first_error_;
  uint64_t round_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

void in_range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) throw ValueError(cat(field, " is ", value, "; expected ", low, " to ", high));
}

double since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

class ModelRunner final : public Runner {
 public:
  ModelRunner(const RunnerOptions& o, const ModelConfig& config, std::unique_ptr<Weights> weights_read, std::vector<FileRecord> records)
      : config_(config), files_(std::move(weights_read)), ranks_(o.tensor_parallel) {
    const auto start = std::chrono::steady_clock::now();
    for (const auto& f : files_->files())
      if (!f->architecture.empty() && f->architecture != config.architecture)
        throw LoadError(cat(o.weights, "/", f->name, ": architecture is \"", f->architecture, "\" in its metadata; expected \"", config.architecture, "\" as in config.json"));
    verification_ = std::make_unique<Verification>(*files_, std::move(records), threads_of(o));
    try {
      load(o, start);
    } catch (const LoadError&) {
      verification_->wait();  // if the files are damaged, that is what is wrong
      throw;
    }
    verification_->wait();
    stats_.verified_s = verification_->seconds();
    stats_.verified_bytes = verification_->bytes();
    stats_.total_s = since(start);
    verification_.reset();
    if (device() != "cpu") files_.reset();
  }

  const ModelConfig& config() const override { return config_; }
  const Limits& limits() const override { return limits_; }
  std::string device() const override { return rank_[0].ops->device(); }
  std::string dtype() const override { return name_of(rank_[0].ops->act()); }
  int64_t weight_bytes() const override { return weight_bytes_; }
  bool rows_alike() const override { return rank_[0].ops->rows_alike(); }
  LoadStats load_stats() const override { return stats_; }

  void launch(const Batch& batch, int ticket) override {
    std::unique_lock<std::mutex> turn;
    if (group_) turn = group_->turn();
    ranks_.run([&](int r) {
      Rank& rank = rank_[size_t(r)];
      rank.ops->step(batch, ticket, [&] { rank.model->forward(); });
    });
  }

  // Every rank sampled the same tokens; all are waited for.
  Sampled collect(int ticket) override {
    Sampled result;
    try {
      for (Rank& rank : rank_) {
        Sampled sampled = rank.ops->collect(ticket);
        if (&rank == &rank_[0]) result = std::move(sampled);
      }
    } catch (...) {
      if (group_) group_->abort();
      throw;
    }
    if (group_) group_->check();
    return result;
  }

  std::vector<float> logits(const Batch& batch) override {
    launch(batch, 0);
    collect(0);
    std::vector<float> out(size_t(batch.samples()) * size_t(config_.vocab));
    rank_[0].ops->download(out.data(), rank_[0].model->logits(), out.size() * sizeof(float));
    return out;
  }

 private:
  struct Rank {
    std::unique_ptr<Ops> ops;
    std::unique_ptr<Comm> comm;
    std::unique_ptr<Model> model;
  };

  static int threads_of(const RunnerOptions& o) { return o.threads > 0 ? o.threads : int(std::thread::hardware_concurrency()); }

  void load(const RunnerOptions& o, std::chrono::steady_clock::time_point start) {
    const Weights& files = *files_;
    const ModelConfig& config = config_;
    const int world = o.tensor_parallel;
    rank_.resize(size_t(world));
    const Element embedded = files.at("embed.weight", {config.vocab, config.hidden}).element;  // never quantized
    const DType stored = embedded == Element::f16 ? DType::f16 : embedded == Element::bf16 ? DType::bf16 : DType::f32;
    const int threads = world > 1 ? std::max(1, threads_of(o) / world) : o.threads;
    limits_.slots = o.slots;
    limits_.rows = o.prefill_rows + o.slots;
    limits_.max_len = o.max_len > 0 ? o.max_len : config.max_positions;
    std::vector<ModelWeights> weights(static_cast<size_t>(world));
    ranks_.run([&](int r) {
      Rank& rank = rank_[size_t(r)];
      rank.ops = make_ops(rank_device(o.device, r, world), o.dtype, stored, threads);
    });
    stats_.device_s = since(start);
    if (world > 1) {
      if (device() == "cpu")
        group_ = std::make_unique<ThreadGroup>(world);
      else
        group_ = make_device_group(o.device, world);
      ranks_.share(group_.get());
    }
    ranks_.run([&](int r) {
      Rank& rank = rank_[size_t(r)];
      rank.comm = group_ ? group_->join(r, *rank.ops) : std::make_unique<SingleComm>();
      rank.ops->read_matrices_by([this](uint8_t* to, const uint8_t* from, size_t bytes) { verification_->read(to, from, bytes); });
      if (r == 0 && rank.ops->device() == "cpu") verification_->start();  // it reads the weights where they are mapped
      weights[size_t(r)] = load_model_weights(config, files, *rank.ops, *rank.comm);
      try {
        rank.ops->finish_loading();
      } catch (const OverflowError&) {
        check_fits(files, rank.ops->act());
        throw;
      }
    });
    for (const ModelWeights& w : weights) stats_.weight_bytes += w.loaded;
    stats_.weights_s = since(start) - stats_.device_s;
    verification_->start();
    limits_.pages = plan_pages(o);
    ranks_.run([&](int r) {
      Rank& rank = rank_[size_t(r)];
      rank.model = std::make_unique<Model>(config, std::move(weights[size_t(r)]), limits_, *rank.ops, *rank.comm);
    });
    for (const Rank& rank : rank_) weight_bytes_ += rank.model->weight_bytes();
  }

  int plan_pages(const RunnerOptions& o) const {
    const Ops& ops = *rank_[0].ops;
    const int64_t page = kv_page_bytes(config_, ops.act(), o.tensor_parallel), one = limits_.max_pages();
    int64_t pages = o.kv_bytes / page;
    if (o.kv_bytes == 0) {
      pages = ops.device() == "cpu" ? 4 * one : int64_t(double(free_memory()) * 0.9) / page;
      pages = std::min(pages, 4 * std::max<int64_t>(o.slots, 1) * one);  // what the slots can fill, and three times that for the prefix cache
    }
    if (pages < one)
      throw ValueError(cat("kv memory is ", o.kv_bytes ? o.kv_bytes : pages * page, " bytes; one sequence of max_len ",
                           limits_.max_len, " needs ", one * page));
    return int(std::min<int64_t>(pages, 1 << 28));
  }

  size_t free_memory() const {  // of the rank that has least
    size_t least = SIZE_MAX;
    for (const Rank& rank : rank_) least = std::min(least, rank.ops->free_memory());
    return least;
  }

  const ModelConfig config_;
  std::unique_ptr<Weights> files_;  // the CPU reads the weights from the mapping for as long as it runs
  std::unique_ptr<Verification> verification_;  // while loading; uploads of rank_ read through it
  Limits limits_;
  std::unique_ptr<CommGroup> group_;  // with several ranks
  std::vector<Rank> rank_;
  int64_t weight_bytes_ = 0;
  LoadStats stats_;
  Ranks ranks_;
};

}  // namespace

std::unique_ptr<Runner> load_runner(const RunnerOptions& o) {
  in_range("tensor_parallel", o.tensor_parallel, 1, 64);
  in_range("slots", o.slots, 1, kDecodeRows);
  in_range("prefill_rows", o.prefill_rows, 1, 1 << 16);
  in_range("threads", o.threads, 0, 1024);
  if (o.kv_bytes < 0) throw ValueError(cat("kv_bytes is ", o.kv_bytes, "; expected 0 or more"));
  const std::string path = o.weights + "/config.json";
  const std::string text = read_text(path);
  const ModelConfig config = parse_model_config(text, path);
  in_range("max_len", o.max_len, 0, config.max_positions);
  const std::optional<RandomSpec> random = parse_random_spec(text, path);
  return std::make_unique<ModelRunner>(o, config, random ? make_random_weights(config, *random, o.weights) : std::make_unique<Weights>(o.weights),
                                       parse_file_records(text, path));
}

}  // namespace codefuse
