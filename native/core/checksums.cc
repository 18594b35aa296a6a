#include "core/checksums.h"

#include <algorithm>
#include <cctype>
#include <condition_variable>
#include <cstdio>
#include <cstring>

#include "core/json.h"
#include "core/xxh3.h"

namespace codefuse {

namespace {

constexpr size_t kBlock = Xxh3::kBlock;
// In blocks:
constexpr size_t kStretch = (8 << 20) / kBlock;  // whose pages are mapped together
constexpr size_t kStep = (64 << 10) / kBlock;    // hashed while they are in the cache; fewer in one read() are left for later
constexpr size_t kGap = (256 << 10) / kBlock;    // not waited for when those after them have been read: vectors, and where reads meet

size_t bytes_of(const std::vector<uint64_t>& sums) { return sums.size() * sizeof(uint64_t); }

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

struct Verification::Job {
  const WeightsFile* const file;
  const FileRecord record;
  const size_t blocks;  // but for the last 1 to kBlock bytes

  std::mutex mutex;
  std::condition_variable idle;
  bool busy = false;             // a thread has hash and done
  std::map<size_t, Sums> ahead;  // by their first block
  Xxh3 hash;
  size_t done = 0;  // blocks in hash

  Job(const WeightsFile* f, FileRecord r) : file(f), record(std::move(r)), blocks(record.bytes > 240 ? (record.bytes - 1) / kBlock : 0) {}
  const uint8_t* block(size_t b) const { return file->memory.data() + b * kBlock; }
};

Verification::Verification(const Weights& files, std::vector<FileRecord> records, int threads, size_t ahead_bytes)
    : files_(files), threads_most_(threads), ahead_most_(ahead_bytes) {
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
    jobs_.push_back(std::make_unique<Job>(f->second, std::move(r)));
    found.erase(f);
  }
  if (!found.empty())
    throw LoadError(cat(files.directory(), "/", found.begin()->first, ": not one of the files of config.json; expected only those"));
  std::sort(jobs_.begin(), jobs_.end(), [](const auto& a, const auto& b) { return a->record.bytes > b->record.bytes; });
}

Verification::~Verification() {
  stop_ = true;
  for (auto& t : threads_)
    if (t.joinable()) t.join();
}

void Verification::read(uint8_t* to, const uint8_t* from, size_t bytes) {
  const WeightsFile* const file = files_.file_at(from);
  if (!file) {
    std::memcpy(to, from, bytes);
    return;
  }
  const MappedFile& memory = file->memory;
  const auto found = std::find_if(jobs_.begin(), jobs_.end(), [&](const auto& j) { return j->file == file; });
  const size_t begin = size_t(from - memory.data()), first = (begin + kBlock - 1) / kBlock, end = (begin + bytes) / kBlock;
  if (found == jobs_.end() || end < first + kStep) return memory.read(to, from, bytes);
  Job& job = **found;
  const size_t count = std::min(end, job.blocks) - first;
  Sums sums = take_sums(count);
  size_t at = first * kBlock - begin;
  memory.read(to, from, at);
  for (size_t b = 0, n; b < count; b += n, at += n * kBlock) {
    n = std::min(kStep, count - b);
    memory.read(to + at, from + at, n * kBlock);
    Xxh3::sums(to + at, n, sums.data() + b * Xxh3::kSums);
  }
  memory.read(to + at, from + at, bytes - at);
  {
    std::lock_guard<std::mutex> lock(job.mutex);
    if (first >= job.done && ahead_bytes_ + bytes_of(sums) <= ahead_most_ && job.ahead.count(first) == 0) {
      ahead_bytes_ += bytes_of(sums);
      job.ahead[first] = std::move(sums);
    }
  }
  if (!sums.empty()) return give_back(std::move(sums));
  advance(job, false);
}

// Adds what has been read to the hash, and what lies between: if it is little, or all of it up to the last block (whole).
void Verification::advance(Job& job, bool whole) {
  std::unique_lock<std::mutex> lock(job.mutex);
  if (job.busy && !whole) return;
  job.idle.wait(lock, [&] { return !job.busy; });
  job.busy = true;
  try {
    while (!stop_) {
      const auto first = job.ahead.begin();
      size_t next = job.blocks;
      Sums sums;
      if (first != job.ahead.end() && (whole || first->first <= job.done + kGap)) {
        next = first->first;
        sums = std::move(first->second);
        job.ahead.erase(first);
        ahead_bytes_ -= bytes_of(sums);
        if (next < job.done) continue;
      } else if (!whole || job.done == job.blocks) {
        break;
      }
      lock.unlock();
      const size_t gap = next - job.done;
      if (gap <= kGap) {
        std::vector<uint8_t> bytes(gap * kBlock);
        job.file->memory.read(bytes.data(), job.block(job.done), bytes.size());
        job.hash.blocks(bytes.data(), gap);
      } else {
        for (size_t b = job.done, n; b < next && !stop_; b += n) {
          n = std::min(kStretch, next - b);
          populate(job.block(b), n * kBlock);
          job.hash.blocks(job.block(b), n);
        }
      }
      const size_t count = sums.size() / Xxh3::kSums;
      job.hash.add(sums.data(), count);
      give_back(std::move(sums));
      lock.lock();
      job.done = next + count;
    }
  } catch (...) {  // of read()
    lock.lock();
    job.busy = false;
    job.idle.notify_all();
    throw;
  }
  job.busy = false;
  job.idle.notify_all();
}

Verification::Sums Verification::take_sums(size_t blocks) {
  Sums sums;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!spare_.empty()) {
      sums = std::move(spare_.back());
      spare_.pop_back();
    }
  }
  sums.resize(blocks * Xxh3::kSums);
  return sums;
}

void Verification::give_back(Sums sums) {
  if (sums.empty()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  spare_.push_back(std::move(sums));
}

void Verification::start() {
  if (!threads_.empty() || jobs_.empty()) return;
  for (int t = 0; t < std::clamp(threads_most_, 1, int(jobs_.size())); ++t) threads_.emplace_back([this] { work(); });
}

void Verification::work() {
  try {
    for (size_t i; !stop_ && (i = next_++) < jobs_.size();) finish(*jobs_[i]);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    stop_ = true;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Verification::finish(Job& job) {
  const MappedFile& memory = job.file->memory;
  const FileRecord& record = job.record;
  advance(job, true);
  if (stop_) return;
  const uint64_t hash = record.bytes > 240 ? job.hash.end(memory.data(), memory.size()) : xxh3_64(memory.data(), memory.size());
  if (hash == record.hash) return;
  const std::string path = files_.directory() + "/" + record.name;
  for (const auto& [name, expected] : record.tensors) {
    const TensorView* t = files_.find(name);
    if (!t || t->file != job.file->name) continue;
    const uint64_t found = xxh3_64(t->data, bytes_of(*t));
    if (found != expected) throw LoadError(cat(path, ": tensor ", name, " is damaged: its checksum is ", hex(found), "; expected ", hex(expected)));
  }
  if (const uint64_t now = xxh3_64(memory.data(), memory.size()); now == record.hash)
    throw LoadError(cat(path, ": what was read of it is not what it holds: its checksum is ", hex(hash), "; expected ", hex(now), ": it was being written, or this machine's memory is faulty"));
  throw LoadError(cat(path, record.tensors.empty() ? ": damaged: " : ": its header is damaged: ", "the file's checksum is ", hex(hash), "; expected ", hex(record.hash)));
}

void Verification::wait() {
  start();
  for (auto& t : threads_)
    if (t.joinable()) t.join();
  if (error_) std::rethrow_exception(error_);
}

}  // namespace codefuse
