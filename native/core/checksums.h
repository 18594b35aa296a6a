// What config.json says of the weights files (sizes, checksums), and holding the files to it while they are loaded.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
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

class Verification {
 public:
  // Compares names and sizes at once (LoadError: file, expected, found) and starts hashing on up to `threads` threads. files must outlive it.
  Verification(const Weights& files, std::vector<FileRecord> records, int threads);
  ~Verification();  // stops where it is
  void wait();      // LoadError: file, tensor, checksum expected and found

  double seconds() const { return seconds_; }  // from the start to the last hash, after wait()
  int64_t bytes() const { return bytes_; }

 private:
  void work();
  void check(const WeightsFile& file, const FileRecord& record);

  const Weights& files_;
  std::vector<std::pair<const WeightsFile*, FileRecord>> jobs_;  // the largest first
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::atomic<size_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
  double seconds_ = 0;
  int64_t bytes_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace codefuse
