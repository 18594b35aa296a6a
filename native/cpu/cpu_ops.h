// The CPU device: float32 activations, weights read where they lie in the file. Each op is in the file of its name; together they
// are the specification of every other device.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/sample.h"
#include "ops/ops.h"
#include "ops/rope_table.h"

namespace codefuse::cpu {

class CpuOps final : public Ops {
 public:
  CpuOps(int threads, const Kernels& kernels)
      : pool_(threads), kernels_(kernels), scratch_(size_t(pool_.threads())), sampling_(size_t(pool_.threads())) {}
  ~CpuOps() override;

  std::string device() const override { return "cpu"; }
  DType act() const override { return DType::f32; }
  bool rows_alike() const override { return true; }

  void* alloc(size_t bytes) override;
  size_t free_memory() const override;
  Matrix load_matrix(const std::vector<HostMatrix>& parts) override;
  const float* load_vector(const HostMatrix& v) override;
  void plan(const ModelConfig& config, const Limits& limits, bool replay) override;

  void step(const Batch& batch, int ticket, const std::function<void()>& body) override;
  int rows() const override { return rows_; }
  int samples() const override { return batch_->samples(); }
  Sampled collect(int ticket) override;

  void embed(float* x, const Matrix& table) override;
  void add_position(float* x, const Matrix& table) override;
  void norm(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) override;
  void linear(void* y, const void* x, const Linear& w, const Activation* act_fn, Rows rows) override;
  void linear_add(float* y, const void* x, const Linear& w, bool add_bias) override;
  void gate(void* y, const void* gate, const void* up, Activation act_fn, int n) override;
  void copy_pages(const std::vector<KvLayer>& layers, const ModelConfig& c, int kv_heads) override;
  void rope_store(void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) override;
  void attention(void* out, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) override;
  void take_columns(void* y, const void* x, const int32_t* order, int64_t k) override;
  bool keep_sampled() override;
  void take_kept(void* y, const void* x, size_t bytes) override;
  void gather_logit_rows(float* y, const float* x, int hidden) override;
  void norm_logit_rows(void* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden) override;
  void logits(float* y, const void* x, const Linear& head) override;
  void sample(const float* logits, int vocab) override;

  std::vector<double> time(const Batch& batch, int repeats, const std::function<void()>& body) override;
  void read_matrix(float* y, const Matrix& m) override;
  void upload(void* dst, const void* src, size_t bytes) override;
  void download(void* dst, const void* src, size_t bytes) override;

 private:
  HostMatrix joined(const std::vector<HostMatrix>& parts);  // in memory of our own

  void matmul(const MatmulArgs& a);
  void norm_rows(float* y, const float* x, const Norm& n, NormKind kind, float eps, int hidden, int rows);
  float* scratch(int thread, size_t floats);  // grows only when an op is called with more than plan() foresaw

  Pool pool_;
  const Kernels& kernels_;
  std::vector<std::vector<float>> scratch_;  // [threads]
  std::vector<SampleScratch> sampling_;      // [threads]
  std::vector<void*> owned_;
  Limits limits_;
  int vocab_ = 0;
  RopeTable rope_;

  const Batch* batch_ = nullptr;           // of the current step
  int rows_ = 0;
  std::vector<int32_t> logit_row_, kept_;  // [samples]; [rows_], from keep_sampled() on
  std::vector<int32_t> token_;             // [rows] kLastToken resolved
  std::vector<const int32_t*> row_pages_;  // [rows] each row's page table
  std::vector<int> table_of_;              // [slots]
  std::vector<int32_t> last_token_;        // [slots]
  Sampled sampled_[2];                     // by ticket
  int ticket_ = 0;
};

}  // namespace codefuse::cpu
