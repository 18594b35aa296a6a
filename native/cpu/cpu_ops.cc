// Memory, planning and stepping of the CPU device; the ops are in their own files.
#include "cpu/cpu_ops.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

namespace codefuse::cpu {

namespace {
constexpr size_t kHeader = 64;  // bytes before an allocation; keeps it on a cache line and holds its size
}

CpuOps::~CpuOps() {
  for (void* p : owned_) {
    char* base = static_cast<char*>(p) - kHeader;
    size_t bytes;
    std::memcpy(&bytes, base, sizeof bytes);
    ::munmap(base, bytes);
  }
}

// Pages come from the system zero-filled when first touched, so an unused part of the KV pool costs nothing.
void* CpuOps::alloc(size_t bytes) {
  const size_t total = bytes + kHeader;
  void* base = ::mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw DeviceError(cat("cpu: out of memory asking for ", bytes, " bytes"));
  std::memcpy(base, &total, sizeof total);
  owned_.push_back(static_cast<char*>(base) + kHeader);
  return owned_.back();
}

size_t CpuOps::free_memory() const {
  size_t kib = 0;
  if (std::FILE* f = std::fopen("/proc/meminfo", "r")) {
    char line[128];
    while (std::fgets(line, sizeof line, f))
      if (std::sscanf(line, "MemAvailable: %zu kB", &kib) == 1) break;
    std::fclose(f);
  }
  if (kib == 0) return size_t(::sysconf(_SC_PHYS_PAGES)) * size_t(::sysconf(_SC_PAGESIZE)) / 2;
  return kib * 1024;
}

Matrix CpuOps::load_matrix(const std::vector<HostMatrix>& parts) {
  Matrix out;
  out.host = parts.size() == 1 ? parts[0] : joined(parts);
  out.rows = out.host.rows;
  out.cols = out.host.cols;
  return out;
}

HostMatrix CpuOps::joined(const std::vector<HostMatrix>& parts) {
  HostMatrix all = parts[0];
  all.rows = 0;
  for (const HostMatrix& p : parts) all.rows += p.rows;
  const auto join = [&](const auto& rows_of /*(part) -> HostRows*/, size_t bytes /*of a row*/) {
    if (bytes == 0) return HostRows{};
    auto* const data = static_cast<uint8_t*>(alloc(size_t(all.rows) * bytes));
    uint8_t* to = data;
    for (const HostMatrix& p : parts)
      for (int64_t r = 0; r < p.rows; ++r, to += bytes) std::memcpy(to, rows_of(p).row(r), bytes);
    return HostRows{data, bytes};
  };
  const HostRows elements = join([](const HostMatrix& p) { return HostRows{p.data, p.stride}; }, row_bytes(all.format, all.cols));
  all.data = elements.data;
  all.stride = elements.stride;
  all.scale = join([](const HostMatrix& p) { return p.scale; }, scale_bytes(all.format, all.cols));
  all.zero = join([](const HostMatrix& p) { return p.zero; }, zero_bytes(all.format, all.cols));
  return all;
}

const float* CpuOps::load_vector(const HostMatrix& v) {
  if (v.empty()) return nullptr;
  float* out = static_cast<float*>(alloc(size_t(v.cols) * sizeof(float)));
  decode_row(v, 0, out);
  return out;
}

void CpuOps::plan(const ModelConfig& c, const Limits& limits, bool /*replay*/) {
  limits_ = limits;
  vocab_ = c.vocab;
  rope_ = make_rope_table(c, limits.max_len);
  token_.reserve(size_t(limits.rows));
  row_pages_.reserve(size_t(limits.rows));
  table_of_.assign(size_t(limits.slots), 0);
  last_token_.assign(size_t(limits.slots), 0);
  for (SampleScratch& s : sampling_) s.reserve(c.vocab);
  for (int t = 0; t < pool_.threads(); ++t) scratch(t, size_t(std::max(c.hidden, limits.max_len)));
}

float* CpuOps::scratch(int thread, size_t floats) {
  auto& s = scratch_[size_t(thread)];
  if (s.size() < floats) s.resize(floats);
  return s.data();
}

void CpuOps::step(const Batch& batch, int ticket, const std::function<void()>& body) {
  check_batch(batch, limits_, vocab_);
  batch_ = &batch;
  ticket_ = ticket;
  rows_ = batch.rows();
  logit_row_ = batch.logit_row;
  sampled_[ticket] = {};
  for (size_t i = 0; i < batch.table_slot.size(); ++i) table_of_[size_t(batch.table_slot[i])] = int(i);
  token_.resize(size_t(batch.rows()));
  row_pages_.resize(size_t(batch.rows()));
  for (int t = 0; t < batch.rows(); ++t) {
    token_[t] = batch.token[t] == kLastToken ? last_token_[batch.slot[t]] : batch.token[t];
    row_pages_[t] = batch.table.data() + size_t(table_of_[batch.slot[t]]) * size_t(limits_.max_pages());
  }
  body();
  batch_ = nullptr;
}

Sampled CpuOps::collect(int ticket) { return std::move(sampled_[ticket]); }

std::vector<double> CpuOps::time(const Batch& batch, int repeats, const std::function<void()>& body) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  step(batch, 0, body);  // the first finds nothing in the caches
  for (int i = 0; i < repeats; ++i)
    step(batch, 0, [&] {
      const auto start = Clock::now();
      body();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    });
  return seconds;
}

void CpuOps::read_matrix(float* y, const Matrix& m) {
  for (int64_t r = 0; r < m.rows; ++r) decode_row(m.host, r, y + r * m.cols);
}

void CpuOps::upload(void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); }
void CpuOps::download(void* dst, const void* src, size_t bytes) { std::memcpy(dst, src, bytes); }

}  // namespace codefuse::cpu

namespace codefuse {

std::vector<std::string> cpu_kernels() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::usable_kernels()) names.push_back(k->name);
  return names;
}

std::unique_ptr<Ops> make_cpu_ops(int threads, const std::string& name) {
  for (const cpu::Kernels* k : cpu::usable_kernels())
    if (name.empty() || name == k->name) return std::make_unique<cpu::CpuOps>(threads, *k);
  throw ValueError(cat("kernels is '", name, "'; this processor does not run them"));
}

}  // namespace codefuse
