#include "model/random_weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <thread>
#include <vector>

#include "core/json.h"

namespace codefuse {

namespace {

constexpr size_t kPool = size_t(512) << 20, kAlign = 64;
constexpr double kStd = 0.02;

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint16_t f32_to_f16(float x) {  // |x| < 65504, to nearest
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude < 0x38800000) return uint16_t(sign | uint32_t(std::lrint(std::fabs(x) * 16777216.f)));  // subnormal: units of 2^-24
  return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}

uint32_t encoded(Format format, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return format == Format::f32 ? u : format == Format::bf16 ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : f32_to_f16(x);
}

// 65536 normal values by Box and Muller; the pool draws from them.
template <class T>
std::vector<T> normal_table(const RandomSpec& spec) {
  std::vector<T> table(65536);
  for (size_t i = 0; i < table.size(); ++i) {
    const uint64_t r = mixed(spec.seed ^ mixed(i));
    const double radius = std::sqrt(-2 * std::log((double(uint32_t(r)) + 0.5) / 4294967296.0));
    table[i] = T(encoded(spec.format, float(kStd * radius * std::cos(2 * 3.14159265358979323846 * double(r >> 32) / 4294967296.0))));
  }
  return table;
}

template <class T>
void fill(T* out, size_t n /*multiple of 4*/, const RandomSpec& spec) {
  const std::vector<T> table = normal_table<T>(spec);
  const size_t count = std::max(1u, std::thread::hardware_concurrency()), words = n / 4;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t)
    threads.emplace_back([&, t] {
      for (size_t w = words * t / count; w < words * (t + 1) / count; ++w) {
        const uint64_t r = mixed(spec.seed * 0xD1342543DE82EF95ull + w);
        for (size_t j = 0; j < 4; ++j) out[4 * w + j] = table[r >> 16 * j & 0xffff];
      }
    });
  for (auto& t : threads) t.join();
}

// `period` bytes of memory that appear again and again over `bytes` bytes of addresses, so that a matrix larger than the pool
// is still one run of rows.
class RepeatedMemory {
 public:
  RepeatedMemory(size_t period, size_t bytes) : size_((bytes + period - 1) / period * period) {
    const int file = ::memfd_create("codefuse-random-weights", MFD_CLOEXEC);
    const bool sized = file >= 0 && ::ftruncate(file, off_t(period)) == 0;
    void* base = sized ? ::mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : MAP_FAILED;
    bool good = base != MAP_FAILED;
    if (good) data_ = static_cast<uint8_t*>(base);
    for (size_t at = 0; good && at < size_; at += period)
      good = ::mmap(data_ + at, period, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != MAP_FAILED;
    if (file >= 0) ::close(file);
    if (!good) {
      release();
      throw LoadError(cat("random weights: cannot map ", period >> 20, " MB of memory: ", std::strerror(errno)));
    }
  }
  ~RepeatedMemory() { release(); }
  RepeatedMemory(const RepeatedMemory&) = delete;
  RepeatedMemory& operator=(const RepeatedMemory&) = delete;
  uint8_t* data() const { return data_; }

 private:
  void release() {
    if (data_) ::munmap(data_, size_);
  }

  uint8_t* data_ = nullptr;
  size_t size_;
};

struct Memory {
  Memory(size_t period, size_t bytes) : pool(period, bytes) {}
  RepeatedMemory pool;
  std::vector<uint8_t> ones;
};

struct Named {
  std::string name;
  std::vector<int64_t> shape;
};

std::vector<Named> tensors_of(const ModelConfig& c) {
  const int64_t h = c.hidden, f = c.intermediate, a = int64_t(c.heads) * c.head_dim;
  std::vector<Named> out;
  const auto linear = [&](const std::string& name, int64_t rows, int64_t cols) {
    out.push_back({name + ".weight", {rows, cols}});
    out.push_back({name + ".bias", {rows}});
  };
  const auto norm = [&](const std::string& name) {
    out.push_back({name + ".weight", {h}});
    if (c.norm == NormKind::layer) out.push_back({name + ".bias", {h}});
  };
  out.push_back({"embed.weight", {c.vocab, h}});
  if (c.position == PositionKind::learned) out.push_back({"position.weight", {c.max_positions, h}});
  for (int i = 0; i < c.layers; ++i) {
    const std::string at = cat("layers.", i, ".");
    norm(at + "norm1");
    if (c.two_norms()) norm(at + "norm2");
    linear(at + "qkv", c.qkv_rows(), h);
    linear(at + "attn_out", h, a);
    linear(at + "mlp_up", f, h);
    if (c.gated) linear(at + "mlp_gate", f, h);
    linear(at + "mlp_down", h, f);
  }
  norm("final_norm");
  if (!c.tied) out.push_back({"lm_head.weight", {c.vocab, h}});
  return out;
}

bool is_norm_weight(const std::string& name) {
  return name.find("norm") != std::string::npos && name.size() > 7 && name.compare(name.size() - 7, 7, ".weight") == 0;
}

}  // namespace

std::optional<RandomSpec> parse_random_spec(const std::string& config_text, const std::string& path) {
  const Json json = parse_json(config_text.data(), config_text.size(), path);
  const Json* random = json.find("random");
  if (!random) return std::nullopt;
  const Json *seed = random->find("seed"), *format = random->find("format");
  if (!seed || !seed->is_integer() || seed->integer() < 0)
    throw LoadError(cat(path, ": random: seed is ", seed ? seed->shown() : "missing", "; expected an integer, 0 or more"));
  if (!format || !format->is(Json::Kind::string))
    throw LoadError(cat(path, ": random: format is ", format ? format->shown() : "missing", "; expected a format id"));
  try {
    return RandomSpec{uint64_t(seed->integer()), parse_format(format->string)};
  } catch (const ValueError& e) {
    throw LoadError(cat(path, ": random: ", e.what()));
  }
}

std::unique_ptr<Weights> make_random_weights(const ModelConfig& config, const RandomSpec& spec, const std::string& directory) {
  const std::vector<Named> named = tensors_of(config);
  const auto bytes_of = [&](const Named& n) {
    return size_t(n.shape[0]) * row_bytes(spec.format, n.shape.size() > 1 ? n.shape[1] : 1);
  };
  size_t total = 0, largest = 0;
  for (const Named& n : named) {
    total += (bytes_of(n) + kAlign - 1) / kAlign * kAlign;
    largest = std::max(largest, bytes_of(n));
  }
  const size_t page = size_t(::sysconf(_SC_PAGESIZE)), period = (std::min(total, kPool) + page - 1) / page * page;
  auto memory = std::make_shared<Memory>(period, period + largest);
  uint8_t* pool = memory->pool.data();
  if (spec.format == Format::f32)
    fill(reinterpret_cast<uint32_t*>(pool), period / 4, spec);
  else
    fill(reinterpret_cast<uint16_t*>(pool), period / 2, spec);

  const uint32_t one = encoded(spec.format, 1.f);
  const size_t element = row_bytes(spec.format, 1);
  memory->ones.resize(size_t(config.hidden) * element);
  for (size_t i = 0; i < memory->ones.size(); i += element) std::memcpy(&memory->ones[i], &one, element);

  std::map<std::string, TensorView> tensors;
  size_t at = 0;
  for (const Named& n : named) {
    TensorView t;
    t.dtype = spec.format == Format::f32 ? DType::f32 : spec.format == Format::f16 ? DType::f16 : DType::bf16;
    t.shape = n.shape;
    t.data = is_norm_weight(n.name) ? memory->ones.data() : pool + at;
    t.file = "random weights";
    tensors.emplace(n.name, std::move(t));
    at = (at + (bytes_of(n) + kAlign - 1) / kAlign * kAlign) % period;
  }
  return std::make_unique<Weights>(directory, std::move(tensors), std::move(memory));
}

}  // namespace codefuse
