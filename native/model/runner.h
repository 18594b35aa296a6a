// What engine/ sees of a model: limits, steps, results. Implemented by model/model.h over Ops and Comm.
#pragma once
#include <memory>
#include <string>

#include "core/config.h"
#include "ops/batch.h"

namespace codefuse {

struct RunnerOptions {
  std::string weights;           // directory with config.json and *.safetensors
  std::string device = "cpu";    // "cpu" | "cuda" | "cuda:N" | "auto" (cuda if there is one, else cpu)
  std::string dtype = "auto";    // "auto" | "float32" | "float16" | "bfloat16"
  int tensor_parallel = 1;       // ranks, one device (CUDA) or one thread group (CPU) each
  int slots = 16;                // 1..kDecodeRows
  int prefill_rows = 512;        // prompt tokens of one step at most
  int max_len = 0;               // 0: the model's max_positions
  int64_t kv_bytes = 0;          // of each rank; 0: CPU: enough for 4 sequences of max_len; CUDA: for 4 x slots, at most 90 % of what is free after the weights
  int threads = 0;               // CPU threads of all ranks together, 0: all cores
};

struct LoadStats {
  double device_s = 0;        // until the devices were ready
  double weights_s = 0;       // then until the weights were in their memory
  double verified_s = 0;      // until every file was checked, from the beginning, mostly during weights_s; 0: the directory has no checksums
  double total_s = 0;
  int64_t weight_bytes = 0;   // of the files, given to the devices, all ranks together
  int64_t verified_bytes = 0;
};

class Runner {
 public:
  virtual ~Runner() = default;
  virtual const ModelConfig& config() const = 0;
  virtual const Limits& limits() const = 0;
  virtual std::string device() const = 0;   // "cpu", "cuda:0"
  virtual std::string dtype() const = 0;    // compute dtype
  virtual int64_t weight_bytes() const = 0; // read by one decode step
  virtual bool rows_alike() const = 0;      // Ops::rows_alike
  virtual LoadStats load_stats() const { return {}; }
  // Starts a step; tickets alternate 0, 1. collect(ticket) waits for it.
  virtual void launch(const Batch& batch, int ticket) = 0;
  virtual Sampled collect(int ticket) = 0;
  // Runs batch alone and returns the logits of its logit rows [samples * vocab]; for tests and perplexity.
  virtual std::vector<float> logits(const Batch& batch) = 0;
};

// Reads, checks and uploads the weights; ValueError for options, LoadError for files, DeviceError for the device.
std::unique_ptr<Runner> load_runner(const RunnerOptions& options);

}  // namespace codefuse
