#include "core/checksums.h"

#include <algorithm>
#include <cctype>
#include <cstdio>

#include "core/json.h"
#include "core/xxh3.h"

namespace codefuse {

namespace {

constexpr size_t kStretch = 8 << 20;  // bytes whose pages are mapped together

std::string hex(uint64_t v) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(v));
  return text;
}

uint64_t parse_hash(const Json* v, const std::string& where) {
  const auto digit = [](char c) { return std::isxdigit(static_cast<unsigned char>(c)) != 0; };
  if (!v || !v->is(Json::Kind::string) || v->string.size() != 16 || !std::all_of(v->string.begin(), v->string.end(), digit))
    throw LoadError(cat(where, " is ", v ? v->shown() : "missing", "; expected 16 hexadecimal digits"));
  return std::stoull(v->string, nullptr, 16);
}

// Stops early, with any value, when stop is set.
uint64_t hash_of(const MappedFile& file, const std::atomic<bool>& stop) {
  constexpr size_t kBlock = Xxh3::kBlock;
  if (file.size() <= 240) return xxh3_64(file.data(), file.size());
  const size_t blocks = (file.size() - 1) / kBlock, stretch = kStretch / kBlock;
  Xxh3 h;
  for (size_t b = 0; b < blocks && !stop; b += stretch) {
    const size_t count = std::min(stretch, blocks - b);
    populate(file.data() + b * kBlock, count * kBlock);
    h.blocks(file.data() + b * kBlock, count);
  }
  return h.end(file.data(), file.size());
}

}  // namespace

std::vector<FileRecord> parse_file_records(const std::string& config_text, const std::string& path) {
  const Json json = parse_json(config_text.data(), config_text.size(), path);
  std::vector<FileRecord> records;
  const Json* files = json.find("files");
  if (!files) return records;
  if (!files->is(Json::Kind::array)) throw LoadError(cat(path, ": files is ", files->shown(), "; expected an array"));
  for (size_t i = 0; i < files->items.size(); ++i) {
    const std::string at = cat(path, ": files[", i, "]");
    const Json& item = files->items[i];
    if (!item.is(Json::Kind::object)) throw LoadError(cat(at, " is ", item.shown(), "; expected an object"));
    const Json *name = item.find("name"), *bytes = item.find("bytes"), *tensors = item.find("tensors");
    if (!name || !name->is(Json::Kind::string)) throw LoadError(cat(at, ".name is ", name ? name->shown() : "missing", "; expected a file name"));
    if (!bytes || !bytes->is_integer() || bytes->integer() < 0)
      throw LoadError(cat(at, ".bytes is ", bytes ? bytes->shown() : "missing", "; expected an integer, 0 or more"));
    FileRecord r{name->string, uint64_t(bytes->integer()), parse_hash(item.find("xxh3_64"), at + ".xxh3_64"), {}};
    if (tensors) {
      if (!tensors->is(Json::Kind::object)) throw LoadError(cat(at, ".tensors is ", tensors->shown(), "; expected an object"));
      for (size_t t = 0; t < tensors->keys.size(); ++t) r.tensors[tensors->keys[t]] = parse_hash(&tensors->items[t], cat(at, ".tensors.", tensors->keys[t]));
    }
    records.push_back(std::move(r));
  }
  return records;
}

Verification::Verification(const Weights& files, std::vector<FileRecord> records, int threads) : files_(files) {
  if (records.empty()) return;
  std::map<std::string, const WeightsFile*> found;
  for (const auto& f : files.files()) found[f->name] = f.get();
  for (FileRecord& r : records) {
    const auto f = found.find(r.name);
    const std::string path = files.directory() + "/" + r.name;
    if (f == found.end()) throw LoadError(cat(path, ": missing; config.json lists it with ", r.bytes, " bytes"));
    const uint64_t size = f->second->memory.size();
    if (size != r.bytes)
      throw LoadError(cat(path, ": has ", size, " bytes; expected ", r.bytes, " as in config.json", size < r.bytes ? ": truncated" : ""));
    bytes_ += int64_t(size);
    jobs_.emplace_back(f->second, std::move(r));
    found.erase(f);
  }
  if (!found.empty())
    throw LoadError(cat(files.directory(), "/", found.begin()->first, ": not one of the files of config.json; expected only those"));
  std::sort(jobs_.begin(), jobs_.end(), [](const auto& a, const auto& b) { return a.second.bytes > b.second.bytes; });
  for (int t = 0; t < std::clamp(threads, 1, int(jobs_.size())); ++t) threads_.emplace_back([this] { work(); });
}

Verification::~Verification() {
  stop_ = true;
  for (auto& t : threads_)
    if (t.joinable()) t.join();
}

void Verification::work() {
  try {
    for (size_t i; !stop_ && (i = next_++) < jobs_.size();) check(*jobs_[i].first, jobs_[i].second);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    stop_ = true;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Verification::check(const WeightsFile& file, const FileRecord& record) {
  const uint64_t hash = hash_of(file.memory, stop_);
  if (stop_ || hash == record.hash) return;
  const std::string path = files_.directory() + "/" + record.name;
  for (const auto& [name, expected] : record.tensors) {
    const TensorView* t = files_.find(name);
    if (!t || t->file != file.name) continue;
    const uint64_t found = xxh3_64(t->data, bytes_of(*t));
    if (found != expected) throw LoadError(cat(path, ": tensor ", name, " is damaged: its checksum is ", hex(found), "; expected ", hex(expected)));
  }
  throw LoadError(cat(path, record.tensors.empty() ? ": damaged: " : ": its header is damaged: ", "the file's checksum is ", hex(hash), "; expected ", hex(record.hash)));
}

void Verification::wait() {
  for (auto& t : threads_)
    if (t.joinable()) t.join();
  if (error_) std::rethrow_exception(error_);
}

}  // namespace codefuse
