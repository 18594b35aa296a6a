// The device seam: what model/ asks of a device. native/cpu is the specification, native/cuda must agree with it.
// `act` is the compute dtype (activations and KV cache); the residual stream, norms' arithmetic and logits are float32.
// Pointers are device memory of this Ops. T = rows of the current batch, from keep_sampled() on those that it keeps. Calls are ordered; none of those inside a step allocates.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/dtype.h"
#include "formats/format.h"
#include "ops/batch.h"

namespace codefuse {

// A matrix as the device holds it; `data` is the device's own layout (the CPU points into the file).
struct Matrix {
  HostMatrix host;             // CPU: where the elements are. CUDA: shape and format only (data == nullptr)
  const void* data = nullptr;  // CUDA: tiles
  int64_t rows = 0, cols = 0;  // [out, in]
};

struct Linear {
  Matrix weight;                // [N, K]
  const float* bias = nullptr;  // [N] or nullptr
  const int32_t* order = nullptr;  // [K] or nullptr: column k multiplies input order[k] (take_columns), which the ops below leave to their caller
};

struct Norm {
  const float* weight = nullptr;  // [H]
  const float* bias = nullptr;    // [H] or nullptr
};

// Keys and values of one layer: [pages, kv_heads, kPageTokens, head_dim] each, of the compute dtype.
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
};

// Of a step, those that an op is for.
enum class Rows { all, decode, prefill };

class Ops {
 public:
  virtual ~Ops() = default;
  virtual std::string device() const = 0;  // "cpu", "cuda:0"
  virtual DType act() const = 0;
  // A decode row leaves the same bits, K and V included, as a prefill row of the same token and position.
  virtual bool rows_alike() const = 0;

  // ---- load time -------------------------------------------------------------------------------------------------
  virtual void* alloc(size_t bytes) = 0;               // zero-filled; freed with the Ops; DeviceError says how much was asked
  virtual size_t free_memory() const = 0;              // bytes that alloc could still give
  // How to copy bytes that HostMatrix points to, from any thread until finish_loading(); before the first load_matrix. Without it they are read
  // from memory, as the CPU does in any case.
  using ReadBytes = std::function<void(uint8_t* to, const uint8_t* from, size_t bytes)>;
  virtual void read_matrices_by(const ReadBytes&) {}
  // For linear() and embed(): the rows of the parts, which have one format and as many columns, one below the other. What they point to
  // must stay until finish_loading(), on the CPU as long as this.
  virtual Matrix load_matrix(const std::vector<HostMatrix>& parts) = 0;
  // Returns when every matrix and vector is loaded; before the first step. OverflowError for a value that act() cannot hold, DeviceError.
  virtual void finish_loading() {}
  virtual const float* load_vector(const HostMatrix& v) = 0;  // [1, n] of any unquantized format -> float32; empty -> nullptr; v is read at once
  // Allocates per-step buffers; called once before the first step. replay: every step has the same body (a model's forward),
  // so a device may record it (CUDA graphs); false in the tests of single ops.
  virtual void plan(const ModelConfig& config, const Limits& limits, bool replay) = 0;

  // ---- a step ----------------------------------------------------------------------------------------------------
  // Uploads the batch, then runs body, which calls the ops below; returns without waiting for the device. After plan(replay =
  // true) a device may record body once and replay it for batches of the same kind, so body must depend on the batch only through
  // the ops (and on the number of rows). A batch without samples is a step whose collect() returns nothing.
  // ticket: parity of the step, 0 or 1: at most two steps are in flight.
  virtual void step(const Batch& batch, int ticket, const std::function<void()>& body) = 0;
  // Of the step under way, with those that only pad it.
  virtual int rows() const = 0;
  virtual int samples() const = 0;
  virtual Sampled collect(int ticket) = 0;  // waits for that step; DeviceError if it failed

  virtual void embed(float* x /*[T,H]*/, const Matrix& table /*[V,H]*/) = 0;
  // learned positions: x[t] += table[position[t]]
  virtual void add_position(float* x /*[T,H]*/, const Matrix& table /*[max_positions,H]*/) = 0;
  virtual void norm(void* y /*[T,H] act*/, const float* x /*[T,H]*/, const Norm& n, NormKind kind, float eps, int hidden) = 0;
  // y = x W^T + b, then the activation if act_fn is given; other rows of y than `rows` stay as they are.
  virtual void linear(void* y /*[T,N] act*/, const void* x /*[T,K] act*/, const Linear& w, const Activation* act_fn = nullptr, Rows rows = Rows::all) = 0;
  // y[t, k] = x[t, order[k]]
  virtual void take_columns(void* y /*[T,K] act*/, const void* x /*[T,K] act*/, const int32_t* order /*[K]*/, int64_t k) = 0;
  // y += x W^T + b  (b skipped when add_bias is false: it is added on one rank only)
  virtual void linear_add(float* y /*[T,N]*/, const void* x /*[T,K] act*/, const Linear& w, bool add_bias = true) = 0;
  // Two of the above that do not depend on each other, for devices that are faster at both together.
  virtual void norm_pair(void* ya, const Norm& na, void* yb, const Norm& nb, const float* x, NormKind kind, float eps, int hidden) {
    norm(ya, x, na, kind, eps, hidden);
    norm(yb, x, nb, kind, eps, hidden);
  }
  virtual void linear_pair(void* ya, const void* xa, const Linear& wa, const Activation* fn_a, void* yb, const void* xb, const Linear& wb,
                           const Activation* fn_b, bool decode_b = false /*yb of decode rows only*/) {
    linear(ya, xa, wa, fn_a);
    linear(yb, xb, wb, fn_b, decode_b ? Rows::decode : Rows::all);
  }
  virtual void linear_add_pair(float* y, const void* xa, const Linear& wa, const void* xb, const Linear& wb, bool add_bias = true) {
    linear_add(y, xa, wa, add_bias);
    linear_add(y, xb, wb, add_bias);
  }
  // y = act_fn(gate) * up; y may be gate or up
  virtual void gate(void* y /*[T,F] act*/, const void* gate /*[T,F] act*/, const void* up /*[T,F] act*/, Activation act_fn, int n) = 0;
  // The batch's page copies in all layers, before any other op of the step reads them. Nothing without copies.
  virtual void copy_pages(const std::vector<KvLayer>& layers, const ModelConfig& c, int kv_heads) = 0;
  // Rotates Q and K (rope; D = head_dim, first rope_dim dimensions, pairs (i, i + rope_dim/2)), stores K and V in their pages.
  // heads and kv_heads are this rank's.
  virtual void rope_store(void* qkv /*[T,(heads+2*kv_heads)*D] act*/, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) = 0;
  // Softmax(q k^T / sqrt(D)) v over positions max(0, p - window + 1) .. p of each row's sequence, p = its position.
  virtual void attention(void* out /*[T,heads*D] act*/, const void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) = 0;
  // Both, bit for bit; qkv afterwards is unspecified.
  virtual void rope_attention(void* out, void* qkv, const KvLayer& kv, const ModelConfig& c, int heads, int kv_heads) {
    rope_store(qkv, kv, c, heads, kv_heads);
    attention(out, qkv, kv, c, heads, kv_heads);
  }
  // For the end of the last layer, which only samples need: to the end of the step its prefill rows are those that are sampled, in the order of
  // samples, behind the decode rows, which stay. false: that is no fewer, and nothing changes.
  virtual bool keep_sampled() = 0;
  // After keep_sampled() gave true: y[t] = x[the row that t was], of so many bytes each, a multiple of 2.
  virtual void take_kept(void* y /*[T]*/, const void* x, size_t bytes) = 0;
  // y[s] = x[logit_row[s]], or where keep_sampled() has put that row
  virtual void gather_logit_rows(float* y /*[S,H]*/, const float* x /*[T,H]*/, int hidden) = 0;
  // As norm() and linear() over the S rows of gather_logit_rows; logits stay float32.
  virtual void norm_logit_rows(void* y /*[S,H] act*/, const float* x /*[S,H]*/, const Norm& n, NormKind kind, float eps, int hidden) = 0;
  virtual void logits(float* y /*[S,N]*/, const void* x /*[S,K] act*/, const Linear& head) = 0;
  // Chooses a token for every sample (see native/cpu/sample.cc for the exact rule) after the batch's edits and masks, keeps it as
  // its slot's last token. The logits stay as they are.
  virtual void sample(const float* logits /*[S,V]*/, int vocab) = 0;

  // ---- tests and tools -------------------------------------------------------------------------------------------
  // Seconds of each of `repeats` runs of body, as that of a step of batch without samples; on CUDA of what it launches, recorded once.
  // After plan().
  virtual std::vector<double> time(const Batch& batch, int repeats, const std::function<void()>& body) = 0;
  virtual void read_matrix(float* y /*[N,K]*/, const Matrix& m) = 0;    // the values, from where and how they lie on the device
  virtual void upload(void* dst, const void* src, size_t bytes) = 0;    // host -> device, done on return
  virtual void download(void* dst, const void* src, size_t bytes) = 0;  // device -> host, after all earlier work
};

// device: "cpu", "cuda", "cuda:N". dtype: "auto" or a dtype name; auto is float32 on the CPU and `weights` on CUDA.
// shared_max: bytes of shared memory that a block on CUDA may have, 0: what the GPU has; with less it stands in for a smaller one in tests.
// ValueError when the device is not in this build or machine, naming what is available.
std::unique_ptr<Ops> make_ops(const std::string& device, const std::string& dtype, DType weights, int threads, int shared_max = 0);
// threads 0: all cores. kernels: an instruction set of cpu_kernels(), for tests; "": the best.
std::unique_ptr<Ops> make_cpu_ops(int threads, const std::string& kernels = "");
std::vector<std::string> cpu_kernels();  // that this processor runs, best first
std::unique_ptr<Ops> make_cuda_ops(int index, DType act, int threads, int shared_max);  // the last two: as make_ops
// What this build and machine can use, for messages and Python: {"cpu", "cuda:0", ...}; why_no_cuda is empty or the reason.
struct Devices {
  std::string names;        // comma separated
  std::string why_no_cuda;  // "built without CUDA" | "no driver: ..." | "cuBLAS not found: ..."
};
Devices devices();

// ValueError unless the name is auto or a device that can be used here.
void check_device(const std::string& device);

}  // namespace codefuse
