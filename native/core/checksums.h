// What config.json says of the weights files (sizes, checksums), and holding the files to it while they are loaded.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/safetensors.h"

namespace codefuse {

struct FileRecord {
  std::string name;
  uint64_t bytes = 0;
  uint64_t hash = 0;                        // XXH3 (64 bits) of the whole file
  std::map<std::string, uint64_t> tensors;  // the same of each tensor's data: names the damaged one; may be empty
};

// The "files" of a config.json, empty if it has none; LoadError names the key, the value found and what was expected.
std::vector<FileRecord> parse_file_records(const std::string& config_text, const std::string& path);

// Holds the files to their records while they are loaded. What a device reads through read() is hashed on the way, while it is in the cache
// and in whatever order it is read; the rest is hashed after that.
class Verification {
 public:
  // Compares names and sizes (LoadError: file, expected, found). threads: of start(). ahead_bytes: what may be kept of bytes that were read
  // before those in front of them, a sixteenth of their size; of more, none is, and they are read again. files must outlive it.
  Verification(const Weights& files, std::vector<FileRecord> records, int threads, size_t ahead_bytes = size_t(64) << 20);
  ~Verification();  // stops where it is
  // Copies what `from` points to, in a file or elsewhere; from any thread, best some MB at once. LoadError if a file cannot be read.
  void read(uint8_t* to, const uint8_t* from, size_t bytes);
  void start();  // hashes what nobody has read, on threads of its own
  void wait();   // start() and its end; LoadError: file, tensor, checksum expected and found

  double seconds() const { return seconds_; }  // from the beginning to the last hash, after wait()
  int64_t bytes() const { return bytes_; }

 private:
  struct Job;
  using Sums = std::vector<uint64_t>;  // Xxh3::sums of some blocks
  void work();
  void advance(Job& job, bool whole);
  void finish(Job& job);
  Sums take_sums(size_t blocks);
  void give_back(Sums sums);

  const Weights& files_;
  const int threads_most_;
  const size_t ahead_most_;
  std::vector<std::unique_ptr<Job>> jobs_;  // the largest first
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::atomic<size_t> next_{0}, ahead_bytes_{0};  // job; bytes of sums that wait, of all jobs
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<Sums> spare_;  // memory that has been used is cheaper than fresh pages
  std::exception_ptr error_;
  double seconds_ = 0;
  int64_t bytes_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace codefuse
