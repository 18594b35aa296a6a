// A runner whose next token is a hash of the sequence that it finds in its KV pages.
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "bind_testing.h"

using namespace codefuse;

namespace {

// Emulates a device: a thread runs steps in order, launch() returns at once. One KV "vector" is the (token, position, kind) that
// was stored; the next token of a row is a hash of all tokens and kinds up to it, read back through the page table, taken modulo the
// number of tokens that masks allow and edits do not ban. It reports the tokens from the chosen one on as the most likely.
class FakeRunner final : public Runner {
 public:
  FakeRunner(const Limits& limits, int vocab, const std::string& device, const FakeOptions& options)
      : limits_(limits), options_(options), device_(device), store_(size_t(limits.pages) * kPageTokens), last_(size_t(limits.slots), -7) {
    config_.architecture = "fake";
    config_.vocab = vocab;
    config_.max_positions = limits.max_len;
    config_.eos_ids = {0};
    thread_ = std::thread([this] { work(); });
  }
  ~FakeRunner() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      end_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  const ModelConfig& config() const override { return config_; }
  const Limits& limits() const override { return limits_; }
  std::string device() const override { return device_; }
  std::string dtype() const override { return "float32"; }
  int64_t weight_bytes() const override { return 0; }
  bool rows_alike() const override { return options_.rows_alike; }

  void launch(const Batch& batch, int ticket) override {
    if (options_.launch_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(options_.launch_us));
    std::lock_guard<std::mutex> lock(mutex_);
    if (launched_ == options_.fail_launch) throw DeviceError("fake: launch failed");
    if (ticket != launched_ % 2) throw DeviceError("fake: tickets do not alternate");
    if (launched_ - collected_ >= 2) throw DeviceError("fake: three steps in flight");
    ++launched_;
    jobs_.push_back(batch);
    changed_.notify_all();
  }

  Sampled collect(int ticket) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (collected_ >= launched_ || ticket != collected_ % 2) throw DeviceError("fake: collect of a step that was not launched");
    const int step = collected_++;
    changed_.wait(lock, [&] { return done_ > step; });
    if (step == options_.fail_collect) throw DeviceError("fake: collect failed");
    if (!broken_.empty()) throw DeviceError("fake: " + broken_);
    return results_[ticket];
  }

  std::vector<float> logits(const Batch&) override { throw DeviceError("fake: no logits"); }

  int64_t bubbles() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return bubbles_;
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      if (jobs_.empty() && done_ > 0) ++bubbles_;
      changed_.wait(lock, [&] { return end_ || !jobs_.empty(); });
      if (end_) return;
      const Batch batch = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      if (options_.step_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(options_.step_us));
      std::string broken;
      Sampled out;
      try {
        out = step(batch);
      } catch (const std::exception& e) {
        broken = e.what();
      }
      lock.lock();
      results_[done_ % 2] = std::move(out);
      if (broken_.empty()) broken_ = broken;
      ++done_;
      changed_.notify_all();
    }
  }

  static void expect(bool ok, const char* what) {
    if (!ok) throw std::runtime_error(what);
  }

  struct Cell {
    int32_t token = -9, position = -9, kind = -9;
  };

  std::vector<int32_t> allowed_tokens(const Batch& b, size_t sample) const {
    std::vector<char> out(size_t(config_.vocab), 0);
    if (!b.edits.empty())
      for (int32_t e = b.edit_begin[sample]; e < b.edit_begin[sample + 1]; ++e) out[size_t(b.edits[size_t(e)].token)] = b.edits[size_t(e)].add == -INFINITY;
    const int mask = b.mask_of.empty() ? -1 : b.mask_of[sample];
    std::vector<int32_t> allowed;
    for (int32_t t = 0; t < config_.vocab; ++t) {
      const size_t word = size_t(std::max(mask, 0)) * size_t(mask_words(config_.vocab)) + size_t(t) / 32;
      if (!out[size_t(t)] && (mask < 0 || (b.masks[word] >> (t % 32) & 1))) allowed.push_back(t);
    }
    return allowed;
  }

  // Checks the batch, stores its rows, samples.
  Sampled step(const Batch& b) {
    check_batch(b, limits_, config_.vocab);
    const int rows = b.rows(), table_width = limits_.max_pages();
    std::map<int32_t, const int32_t*> table;  // slot -> its pages
    for (size_t i = 0; i < b.table_slot.size(); ++i) table[b.table_slot[i]] = b.table.data() + i * size_t(table_width);
    std::set<std::pair<int32_t, int>> written;  // (page, offset)
    std::map<int32_t, int32_t> writer;          // page -> slot
    for (const PageCopy& c : b.copies)
      for (int i = 0; i < c.tokens; ++i) store_[size_t(c.to) * kPageTokens + size_t(i)] = store_[size_t(c.from) * kPageTokens + size_t(i)];
    for (int r = 0; r < rows; ++r) {
      const int32_t slot = b.slot[size_t(r)], position = b.position[size_t(r)];
      int32_t token = b.token[size_t(r)];
      if (token == kLastToken) token = last_[size_t(slot)];
      expect(token >= 0, "last token of a slot that sampled none");
      const int32_t page = table[slot][position / kPageTokens];
      expect(written.emplace(page, position % kPageTokens).second, "two rows write one KV place");
      expect(writer.emplace(page, slot).first->second == slot, "two sequences write one page");
      store_[size_t(page) * kPageTokens + size_t(position % kPageTokens)] = {token, position, r >= b.decode_rows && !options_.rows_alike};
    }
    Sampled out;
    for (size_t i = 0; i < b.logit_row.size(); ++i) {
      const int32_t row = b.logit_row[i];
      expect(i == 0 || row > b.logit_row[i - 1], "logit rows are not in order");
      const int32_t slot = b.slot[size_t(row)], position = b.position[size_t(row)];
      uint64_t hash = 14695981039346656037ull;
      for (int p = 0; p <= position; ++p) {
        const int32_t page = table[slot][p / kPageTokens];
        const auto wrote = writer.find(page);
        expect(wrote == writer.end() || wrote->second == slot, "a sequence reads a page that another one writes");
        const Cell& c = store_[size_t(page) * kPageTokens + size_t(p % kPageTokens)];
        expect(c.position == p, "KV of another position");
        hash = (hash ^ uint64_t(c.token * 2 + c.kind)) * 1099511628211ull;
      }
      hash ^= b.sample[i].seed * 0x9e3779b97f4a7c15ull;
      hash = (hash ^ (hash >> 31)) * 0xbf58476d1ce4e5b9ull;
      const std::vector<int32_t> allowed = allowed_tokens(b, i);
      const int32_t token = allowed[size_t(hash >> 33) % allowed.size()];
      last_[size_t(slot)] = token;
      out.token.push_back(token);
      out.logprob.push_back(-0.25f * float(token));
      for (int k = 0; k < kTopTokens; ++k) out.top_token.push_back((token + k) % config_.vocab), out.top_logprob.push_back(-0.25f * float(token + k));
    }
    return out;
  }

  const Limits limits_;
  const FakeOptions options_;
  const std::string device_;
  ModelConfig config_;
  std::vector<Cell> store_;     // [pages * kPageTokens], the worker's
  std::vector<int32_t> last_;   // [slots], the worker's

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch> jobs_;
  Sampled results_[2];
  std::string broken_;
  int launched_ = 0, done_ = 0, collected_ = 0;
  int64_t bubbles_ = 0;  // times the device had nothing to do
  bool end_ = false;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Runner> make_fake_runner(const Limits& limits, int vocab, const std::string& device, const FakeOptions& options) {
  return std::make_unique<FakeRunner>(limits, vocab, device, options);
}

int64_t fake_bubbles(const Runner& runner) { return dynamic_cast<const FakeRunner&>(runner).bubbles(); }
