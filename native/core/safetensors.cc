#include "core/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "core/json.h"

namespace codefuse {

namespace fs = std::filesystem;

namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // bytes; the limit of the format's own implementation
constexpr const char* kFormat = "codefuse-triton";  // of tools/weights_writer.py's files, with
constexpr const char* kVersion = "1";

struct Entry {
  std::string name;
  uint64_t begin, end;  // bytes after the header
};

bool parse_element(const std::string& s, Element& out) {
  for (Element e : {Element::f32, Element::f16, Element::bf16, Element::i8, Element::u8, Element::i32})
    if (s == name_of(e)) return out = e, true;
  return false;
}

}  // namespace

const char* name_of(Element e) {
  switch (e) {
    case Element::f32: return "F32";
    case Element::f16: return "F16";
    case Element::bf16: return "BF16";
    case Element::i8: return "I8";
    case Element::u8: return "U8";
    case Element::i32: return "I32";
  }
  return "";
}

MappedFile::MappedFile(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd_ < 0) throw LoadError(cat(path, ": cannot be opened: ", std::strerror(errno)));
  struct stat info;
  if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd_);
    throw LoadError(cat(path, ": not a regular file"));
  }
  size_ = size_t(info.st_size);
  if (size_ == 0) return;
  void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
  if (p == MAP_FAILED) {
    const int error = errno;
    ::close(fd_);
    throw LoadError(cat(path, ": cannot be mapped (", size_, " bytes): ", std::strerror(error)));
  }
  data_ = static_cast<const uint8_t*>(p);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
  ::close(fd_);
}

void MappedFile::read(uint8_t* to, const uint8_t* from, size_t bytes) const {
  for (size_t at = size_t(from - data_); bytes > 0;) {
    const ssize_t n = ::pread(fd_, to, bytes, off_t(at));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      throw LoadError(cat(path_, ": cannot be read at byte ", at, ": ", n < 0 ? std::strerror(errno) : "it ends there; it has become shorter"));
    to += n, at += size_t(n), bytes -= size_t(n);
  }
}

void populate(const uint8_t* data, size_t bytes) {
#ifndef MADV_POPULATE_READ
  constexpr int MADV_POPULATE_READ = 22;  // Linux 5.14; an older one says that it does not know it, and faults will do
#endif
  const size_t page = size_t(::sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<size_t>(data) / page * page;
  ::madvise(reinterpret_cast<void*>(begin), reinterpret_cast<size_t>(data) + bytes - begin, MADV_POPULATE_READ);
}

size_t bytes_of(const TensorView& t) {
  size_t bytes = size_of(t.element);
  for (int64_t d : t.shape) bytes *= size_t(d);
  return bytes;
}

std::string shown_shape(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += cat(i ? ", " : "", shape[i]);
  return s + "]";
}

std::string read_text(const std::string& path) {
  MappedFile file(path);
  return std::string(reinterpret_cast<const char*>(file.data()), file.size());
}

Weights::Weights(const std::string& directory) : directory_(directory) {
  std::error_code error;
  std::vector<std::string> paths;
  for (const auto& entry : fs::directory_iterator(directory, error))
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path().string());
  if (error) throw LoadError(cat(directory, ": cannot be listed: ", error.message()));
  if (paths.empty()) throw LoadError(cat(directory, ": expected *.safetensors files, found none"));
  std::sort(paths.begin(), paths.end());
  for (const auto& path : paths) add_file(path);
}

void Weights::add_file(const std::string& path) {
  files_.emplace_back(new WeightsFile{fs::path(path).filename().string(), "", MappedFile(path)});
  const MappedFile& file = files_.back()->memory;
  if (file.size() < 8) throw LoadError(cat(path, ": expected a safetensors file, found ", file.size(), " bytes"));
  uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i) header_size = header_size << 8 | file.data()[i];
  if (header_size > kMaxHeader || header_size > file.size() - 8)
    throw LoadError(cat(path, ": the header should take ", header_size, " bytes, but the file has ", file.size(),
                        "; truncated or not a safetensors file"));
  const Json header = parse_json(reinterpret_cast<const char*>(file.data()) + 8, header_size, path);
  if (!header.is(Json::Kind::object)) throw LoadError(cat(path, ": expected a JSON object as header, found ", header.shown()));
  const uint8_t* base = file.data() + 8 + header_size;
  const uint64_t available = file.size() - 8 - header_size;

  const Json* metadata = header.find("__metadata__");
  if (metadata && !metadata->is(Json::Kind::object)) throw LoadError(cat(path, ": __metadata__ is ", metadata->shown(), "; expected an object"));
  const auto said = [&](const char* key) {
    const Json* v = metadata ? metadata->find(key) : nullptr;
    return v ? v->string : std::string();
  };
  if (said("format") == kFormat && said("version") != kVersion)
    throw LoadError(cat(path, ": version is \"", said("version"), "\" in its metadata; expected \"", kVersion, "\": written by another version of the tools"));
  files_.back()->architecture = said("architecture");
  std::vector<Entry> entries;
  for (size_t i = 0; i < header.keys.size(); ++i) {
    const std::string& name = header.keys[i];
    if (name == "__metadata__") continue;
    const Json& item = header.items[i];
    const Json *dtype = item.find("dtype"), *shape = item.find("shape"), *offsets = item.find("data_offsets");
    const auto fail = [&](const std::string& why) { throw LoadError(cat(path, ": tensor ", name, ": ", why)); };
    if (!dtype || !shape || !offsets || !dtype->is(Json::Kind::string) || !shape->is(Json::Kind::array) ||
        !offsets->is(Json::Kind::array) || offsets->items.size() != 2)
      fail("expected dtype, shape and two data_offsets");
    TensorView t;
    t.file = fs::path(path).filename().string();
    if (!parse_element(dtype->string, t.element)) fail(cat("dtype is ", dtype->string, "; expected F32, F16, BF16, I8 or U8"));
    if (const Json* format = metadata ? metadata->find(name + ".format") : nullptr) {
      if (!format->is(Json::Kind::string)) fail(cat("its format in the metadata is ", format->shown(), "; expected a format id"));
      t.format = format->string;
    }
    uint64_t bytes = size_of(t.element);
    for (const Json& d : shape->items) {
      if (!d.is_integer() || d.integer() < 0) fail(cat("a dimension is ", d.shown()));
      t.shape.push_back(d.integer());
      if (__builtin_mul_overflow(bytes, uint64_t(d.integer()), &bytes)) fail("its shape is too large");
    }
    const Json &b = offsets->items[0], &e = offsets->items[1];
    if (!b.is_integer() || !e.is_integer() || b.integer() < 0 || e.integer() < b.integer())
      fail(cat("data_offsets are ", b.shown(), " and ", e.shown()));
    const uint64_t begin = uint64_t(b.integer()), end = uint64_t(e.integer());
    if (end - begin != bytes)
      fail(cat("shape ", shown_shape(t.shape), " of ", dtype->string, " takes ", bytes, " bytes; its data_offsets span ", end - begin));
    if (end > available)
      fail(cat("ends at byte ", end, " of the data, but the file has ", available, " bytes of data; truncated"));
    t.data = base + begin;
    entries.push_back({name, begin, end});
    auto [at, fresh] = tensors_.emplace(name, std::move(t));
    if (!fresh) fail(cat("also in ", at->second.file));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  for (size_t i = 1; i < entries.size(); ++i)
    if (entries[i].begin < entries[i - 1].end)
      throw LoadError(cat(path, ": tensor ", entries[i].name, " overlaps tensor ", entries[i - 1].name));
}

const WeightsFile* Weights::file_at(const uint8_t* p) const {
  for (const auto& f : files_)
    if (f->memory.holds(p)) return f.get();
  return nullptr;
}

const TensorView* Weights::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const TensorView& Weights::at(const std::string& name, const std::vector<int64_t>& shape) const {
  const TensorView* t = find(name);
  if (!t) throw LoadError(cat(directory_, ": tensor ", name, " is missing; expected shape ", shown_shape(shape)));
  if (t->shape != shape)
    throw LoadError(cat(directory_, "/", t->file, ": tensor ", name, " has shape ", shown_shape(t->shape), "; expected ", shown_shape(shape)));
  return *t;
}

const TensorView& Weights::at(const std::string& name, const std::vector<int64_t>& shape, Element element) const {
  const TensorView& t = at(name, shape);
  if (t.element != element)
    throw LoadError(cat(directory_, "/", t.file, ": tensor ", name, " has dtype ", name_of(t.element), "; expected ", name_of(element)));
  return t;
}

void Weights::check_all_used(const std::set<std::string>& used) const {
  for (const auto& [name, t] : tensors_)
    if (!used.count(name)) throw LoadError(cat(directory_, "/", t.file, ": tensor ", name, " has no place in the model of config.json"));
}

}  // namespace codefuse
