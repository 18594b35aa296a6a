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

constexpr float kScale8 = float(4 * kStd / 127), kScale4 = float(2.5 * kStd / 8);  // of quantized rows and groups
constexpr uint8_t kZero4 = 8;

int code(float x, float scale, int low, int high) { return std::clamp(int(std::lrint(x / scale)), low, high); }

// What the table holds for two normal values: one element, or (T of a byte) one code or a pair of 4-bit codes.
uint32_t drawn(Format format, float x, float y) {
  if (format == Format::q8_row) return uint8_t(code(x, kScale8, -127, 127));
  if (group_cols(format)) return uint8_t(code(x, kScale4, -8, 7) + kZero4) | uint8_t(code(y, kScale4, -8, 7) + kZero4) << 4;
  return encoded(format, x);
}

// 65536 normal values by Box and Muller; the pool draws from them.
template <class T>
std::vector<T> normal_table(Format format, uint64_t seed) {
  std::vector<T> table(65536);
  for (size_t i = 0; i < table.size(); ++i) {
    const uint64_t r = mixed(seed ^ mixed(i));
    const double radius = kStd * std::sqrt(-2 * std::log((double(uint32_t(r)) + 0.5) / 4294967296.0));
    const double angle = 2 * 3.14159265358979323846 * double(r >> 32) / 4294967296.0;
    table[i] = T(drawn(format, float(radius * std::cos(angle)), float(radius * std::sin(angle))));
  }
  return table;
}

template <class T>
void fill(T* out, size_t n /*multiple of 4*/, Format format, uint64_t seed) {
  const std::vector<T> table = normal_table<T>(format, seed);
  const size_t count = std::max(1u, std::thread::hardware_concurrency()), words = n / 4;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t)
    threads.emplace_back([&, t] {
      for (size_t w = words * t / count; w < words * (t + 1) / count; ++w) {
        const uint64_t r = mixed(seed * 0xD1342543DE82EF95ull + w);
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

constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Random elements of one format, of which tensors take run after run.
class Pool {
 public:
  Pool(Format format, uint64_t seed, size_t total, size_t largest)
      : period_((std::min(total, kPool) + page() - 1) / page() * page()), memory_(period_, period_ + largest) {
    uint8_t* data = memory_.data();
    if (format == Format::f32)
      fill(reinterpret_cast<uint32_t*>(data), period_ / 4, format, seed);
    else if (is_quantized(format))
      fill(data, period_, format, seed);
    else
      fill(reinterpret_cast<uint16_t*>(data), period_ / 2, format, seed);
  }
  const uint8_t* take(size_t bytes) {
    const uint8_t* out = memory_.data() + at_;
    at_ = (at_ + aligned(bytes)) % period_;
    return out;
  }

 private:
  static size_t page() { return size_t(::sysconf(_SC_PAGESIZE)); }

  size_t period_, at_ = 0;
  RepeatedMemory memory_;
};

// The same element n times.
std::vector<uint8_t> repeated(uint32_t element, size_t bytes, size_t n) {
  std::vector<uint8_t> out(bytes * n);
  for (size_t i = 0; i < n; ++i) std::memcpy(&out[i * bytes], &element, bytes);
  return out;
}

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

bool is_matrix(const Named& n) { return n.shape.size() > 1 && n.name.rfind("embed.", 0) != 0 && n.name.rfind("position.", 0) != 0; }
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
  struct Memory {  // what the tensors point to
    std::optional<Pool> floats, codes;
    std::vector<uint8_t> ones, scales, zeros;
  };
  const std::vector<Named> named = tensors_of(config);
  const bool quantized = is_quantized(spec.format);
  const Format plain = quantized ? Format::f16 : spec.format;
  const auto format_of = [&](const Named& n) { return quantized && is_matrix(n) ? spec.format : plain; };
  const auto bytes_of = [&](const Named& n) { return size_t(n.shape[0]) * row_bytes(format_of(n), n.shape.size() > 1 ? n.shape[1] : 1); };
  size_t total[2] = {}, largest[2] = {}, scales = 0;
  for (const Named& n : named) {
    const int pool = is_quantized(format_of(n));
    total[pool] += aligned(bytes_of(n));
    largest[pool] = std::max(largest[pool], bytes_of(n));
    if (!pool) continue;
    const int64_t unit = column_unit(spec.format);
    if (n.shape[1] % unit)
      throw LoadError(cat(directory, "/config.json: random: ", n.name, " has ", n.shape[1], " columns; expected a multiple of ", unit, " in ", name_of(spec.format)));
    scales = std::max(scales, size_t(n.shape[0]) * size_t(unit > 1 ? n.shape[1] / unit : 1));
  }
  auto memory = std::make_shared<Memory>();
  memory->floats.emplace(plain, spec.seed, total[0], largest[0]);
  memory->ones = repeated(encoded(plain, 1.f), row_bytes(plain, 1), size_t(config.hidden));
  if (quantized) {
    memory->codes.emplace(spec.format, spec.seed, total[1], largest[1]);
    const bool q8 = spec.format == Format::q8_row;
    memory->scales = repeated(q8 ? encoded(Format::f32, kScale8) : encoded(Format::f16, kScale4), q8 ? 4 : 2, scales);
    if (!q8) memory->zeros.assign(scales, kZero4);
  }

  std::map<std::string, TensorView> tensors;
  const auto add = [&](const std::string& name, Element element, std::vector<int64_t> shape, const uint8_t* data, Format format = Format::f32) {
    tensors.emplace(name, TensorView{element, is_quantized(format) ? name_of(format) : "", std::move(shape), data, "random weights"});
  };
  const Element element = plain == Format::f32 ? Element::f32 : plain == Format::f16 ? Element::f16 : Element::bf16;
  for (const Named& n : named) {
    const Format format = format_of(n);
    if (!is_quantized(format)) {
      add(n.name, element, n.shape, is_norm_weight(n.name) ? memory->ones.data() : memory->floats->take(bytes_of(n)));
      continue;
    }
    const int64_t unit = column_unit(format);
    const std::string base = n.name.substr(0, n.name.rfind('.'));
    const uint8_t* codes = memory->codes->take(bytes_of(n));
    if (format == Format::q8_row) {
      add(n.name, Element::i8, n.shape, codes, format);
      add(base + ".scale", Element::f32, {n.shape[0]}, memory->scales.data());
    } else {
      add(n.name, Element::u8, {n.shape[0], n.shape[1] / 2}, codes, format);
      add(base + ".scale", Element::f16, {n.shape[0], n.shape[1] / unit}, memory->scales.data());
      add(base + ".zero", Element::u8, {n.shape[0], n.shape[1] / unit}, memory->zeros.data());
    }
  }
  return std::make_unique<Weights>(directory, std::move(tensors), std::move(memory));
}

}  // namespace codefuse
