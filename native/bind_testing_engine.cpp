// Testing hooks of engine/: an Engine over a runner whose next token is a hash of the sequence it finds in its KV pages, the
// scheduler under a script, and the text cut.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "engine/bad_words.h"
#include "engine/beam_search.h"
#include "engine/engine.h"
#include "engine/prefix_constraint.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

struct FakeOptions {
  int fail_launch = -1, fail_collect = -1;  // step that fails
  int64_t step_us = 0;                      // device time of a step
  int64_t launch_us = 0;                    // host time of launch
  bool rows_alike = false;                  // the kind of a row does not count
};

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

// Waits for the first `waiting` tokens. Token number i gets the edit (i, tokens known), and the mask of token `tokens known` while it waits.
class ScriptedRule final : public LogitRules {
 public:
  ScriptedRule(int waiting, int vocab) : waiting_(waiting), vocab_(vocab) {}
  bool waits(const std::vector<int32_t>& generated) override { return int(generated.size()) < waiting_; }
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override {
    changes->edit(index, float(generated.size()));
    if (index >= waiting_) return;
    std::vector<uint32_t> mask(size_t(mask_words(vocab_)), 0);
    mask[generated.size() / 32] |= 1u << (generated.size() % 32);
    changes->allow_only(mask);
  }

 private:
  const int waiting_, vocab_;
};

// A vocabulary and bytes to be spelled with it.
struct Spelling {
  Spelling(TokenBytes tokens, const std::vector<int32_t>& never, int vocab, std::string bytes)
      : table(std::move(tokens)), trie(&table, tokens_by_bytes(table, vocab), never), constraint(&trie, std::move(bytes)), words(size_t(vocab + 31) / 32) {}
  Spelling(const Spelling&) = delete;
  std::vector<int32_t> allowed() const {
    std::vector<uint32_t> mask(words, 0);
    constraint.allow(at, mask.data());
    std::vector<int32_t> ids;
    for (size_t t = 0; t < words * 32; ++t)
      if (mask[t / 32] >> (t % 32) & 1) ids.push_back(int32_t(t));
    return ids;
  }

  TokenBytes table;
  TokenTrie trie;
  PrefixConstraint constraint;
  size_t words;
  size_t at = 0;  // bytes spelled
};

Limits limits_of(int slots, int rows, int max_len, int pages) {
  Limits l;
  l.slots = slots;
  l.rows = rows;
  l.max_len = max_len;
  l.pages = pages;
  return l;
}

}  // namespace

void bind_testing_engine(py::module_& module) {
  py::module_ m = module.def_submodule("testing");

  m.def("fake_engine", [](int slots, int prefill_tokens, int max_len, int pages, int queue, int vocab, TokenBytes token_bytes,
                          const std::string& device, int depth, int fail_launch, int fail_collect, int64_t step_us, int64_t launch_us, bool rows_alike,
                          const std::string& prefix_cache, const std::vector<int32_t>& never_text) {
    auto runner = std::make_unique<FakeRunner>(limits_of(slots, prefill_tokens + slots, max_len, pages), vocab, device,
                                               FakeOptions{fail_launch, fail_collect, step_us, launch_us, rows_alike});
    return std::make_unique<Engine>(std::move(runner), std::move(token_bytes), never_text, EngineOptions{prefill_tokens, queue, depth, prefix_cache});
  }, py::kw_only(), py::arg("slots") = 4, py::arg("prefill_tokens") = 16, py::arg("max_len") = 256, py::arg("pages") = 32, py::arg("queue") = 16,
     py::arg("vocab") = 64, py::arg("token_bytes") = TokenBytes(), py::arg("device") = "fake", py::arg("depth") = 0,
     py::arg("fail_launch") = -1, py::arg("fail_collect") = -1, py::arg("step_us") = 0, py::arg("launch_us") = 0, py::arg("rows_alike") = false,
     py::arg("prefix_cache") = "on", py::arg("never_text") = std::vector<int32_t>());

  m.def("bubbles", [](const Engine& e) { return dynamic_cast<const FakeRunner&>(e.runner()).bubbles(); });

  m.attr("SHORT_PROMPT") = kShortPrompt;
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init([](int slots, int rows, int prefill_rows, int max_len, int pages, const std::string& reuse, int short_prompt) {
        const std::map<std::string, Reuse> kinds{{"none", Reuse::none}, {"same rows", Reuse::same_rows}, {"any rows", Reuse::any_rows}};
        return std::make_unique<Scheduler>(limits_of(slots, rows, max_len, pages), prefill_rows, kinds.at(reuse), short_prompt);
      }), py::kw_only(), py::arg("slots"), py::arg("rows"), py::arg("prefill_rows"), py::arg("max_len"), py::arg("pages"), py::arg("reuse"),
           py::arg("short_prompt") = 0)
      .def("add", [](Scheduler& s, int64_t uid, std::vector<int32_t> prompt, int max_tokens, const std::string& salt, int waiting, int64_t ahead_of) {
        RuleList rules;
        if (waiting >= 0) rules.push_back(std::make_unique<ScriptedRule>(waiting, 64));
        s.add(uid, std::move(prompt), max_tokens, {}, std::move(rules), salt, ahead_of);
      }, py::arg("uid"), py::arg("prompt"), py::arg("max_tokens"), py::arg("salt") = "", py::arg("waiting") = -1, py::arg("ahead_of") = 0)
      .def("accept", &Scheduler::accept)
      .def("remove", &Scheduler::remove)
      .def("schedule", [](Scheduler& s) -> py::object {
        Batch b;
        Step step;
        if (!s.schedule(&b, &step)) return py::none();
        py::list chunks;
        for (const Chunk& c : b.chunks) chunks.append(py::make_tuple(c.row, c.count, c.slot, c.position));
        py::dict d;
        d["decode_rows"] = b.decode_rows;
        d["token"] = b.token;
        d["slot"] = b.slot;
        d["position"] = b.position;
        d["chunks"] = chunks;
        d["logit_row"] = b.logit_row;
        py::list edits;
        for (const LogitEdit& e : b.edits) edits.append(py::make_tuple(e.token, e.add, e.penalty));
        d["edit_begin"] = b.edit_begin;
        d["edits"] = edits;
        d["mask_of"] = b.mask_of;
        d["masks"] = b.masks;
        d["table_slot"] = b.table_slot;
        d["table"] = b.table;
        d["sampled"] = step.sampled;
        py::list admitted, copies;
        for (const Admission& a : step.admitted) admitted.append(py::make_tuple(a.uid, a.cached));
        for (const PageCopy& c : b.copies) copies.append(py::make_tuple(c.from, c.to, c.tokens));
        d["admitted"] = admitted;
        d["copies"] = copies;
        return d;
      })
      .def_property_readonly("needs_results", &Scheduler::needs_results)
      .def_property_readonly("running", &Scheduler::running)
      .def_property_readonly("waiting", &Scheduler::waiting)
      .def_property_readonly("free_pages", &Scheduler::free_pages)
      .def_property_readonly("cached_pages", &Scheduler::cached_pages)
      .def_property_readonly("evictions", &Scheduler::evictions)
      .def_property_readonly("preemptions", &Scheduler::preemptions);

  py::class_<KvPages>(m, "KvPages")
      .def(py::init<int>())
      .def("take", &KvPages::take)
      .def("share", &KvPages::share)
      .def("release", &KvPages::release)
      .def("keep", &KvPages::keep)
      .def("drop", &KvPages::drop)
      .def("references", &KvPages::references)
      .def_property_readonly("free", &KvPages::free)
      .def_property_readonly("idle", &KvPages::idle);

  // One sequence's pages of one tree, as the scheduler would hold them.
  struct Tree {
    KvPages pages;
    PrefixCache cache{&pages};
    explicit Tree(int n) : pages(n) {}
  };
  py::class_<Tree>(m, "PrefixCache")
      .def(py::init<int>(), py::arg("pages"))
      // A sequence that computes keys and ends; the pages that it used. Nothing is taken over.
      .def("put", [](Tree& t, const std::vector<int32_t>& keys, const std::string& salt) {
        std::vector<int32_t> pages;
        for (size_t i = 0; i < keys.size(); i += kPageTokens) {
          if (t.pages.free() == 0 && !t.cache.evict()) throw std::runtime_error("no page");
          pages.push_back(t.pages.take());
        }
        const std::vector<int32_t> used = pages;
        t.cache.touch(t.cache.insert(salt, nullptr, keys, &pages));
        for (int32_t page : pages) t.pages.release(page);
        return used;
      }, py::arg("keys"), py::arg("salt") = "")
      // (tokens, full pages, page to copy from or -1) of the longest match, held until it is released.
      .def("find", [](Tree& t, const std::vector<int32_t>& keys, const std::string& salt) {
        const PrefixCache::Match match = t.cache.find(salt, keys);
        return py::make_tuple(match.tokens, match.pages, match.partial);
      }, py::arg("keys"), py::arg("salt") = "")
      .def("release", [](Tree& t, int32_t page) { t.pages.release(page); })
      .def("evict", [](Tree& t) { return t.cache.evict(); })
      .def_property_readonly("nodes", [](const Tree& t) { return t.cache.nodes(); })
      .def_property_readonly("free", [](const Tree& t) { return t.pages.free(); })
      .def_property_readonly("idle", [](const Tree& t) { return t.pages.idle(); });

  // Tokens have the bytes of token_bytes; next: per running beam (tokens, log-probs).
  py::class_<BeamSearch>(m, "BeamSearch")
      .def(py::init([](int width, float length_penalty, float diversity_rate, bool early_stopping, int max_tokens, std::vector<int32_t> end_ids,
                       const TokenBytes& token_bytes, std::vector<std::string> stops) {
        static std::deque<TokenBytes> tables;  // which texts refer to
        tables.push_back(token_bytes);
        return std::make_unique<BeamSearch>(BeamOptions{width, width, length_penalty, diversity_rate, early_stopping}, max_tokens, std::move(end_ids),
                                            TextCut(&tables.back(), {std::move(stops)}));
      }), py::kw_only(), py::arg("width"), py::arg("length_penalty") = 1.f, py::arg("diversity_rate") = 0.f, py::arg("early_stopping") = false,
           py::arg("max_tokens"), py::arg("end_ids") = std::vector<int32_t>(), py::arg("token_bytes") = TokenBytes(),
           py::arg("stops") = std::vector<std::string>())
      .def_static("candidates", &BeamSearch::candidates, py::arg("width"), py::arg("end_ids"))
      .def("advance", [](BeamSearch& s, const std::vector<std::pair<std::vector<int32_t>, std::vector<float>>>& next) {
        std::vector<TopTokens> tops;
        for (auto& [tokens, logprobs] : next) tops.push_back({tokens, logprobs});
        return s.advance(tops);
      })
      .def_property_readonly("running", [](const BeamSearch& s) {
        py::list out;
        for (const BeamSearch::Beam& b : s.running()) out.append(py::make_tuple(b.tokens, b.score));
        return out;
      })
      .def_property_readonly("finished", [](BeamSearch& s) {
        py::list out;
        for (const BeamSearch::Beam& b : s.finished()) out.append(py::make_tuple(b.tokens, b.score, name_of(b.finish)));
        return out;
      });

  py::class_<Spelling>(m, "Spelling")
      .def(py::init<TokenBytes, const std::vector<int32_t>&, int, std::string>(), py::arg("tokens"), py::arg("never"), py::arg("vocab"),
           py::arg("bytes"))
      .def_property_readonly("possible", [](const Spelling& s) { return s.constraint.possible(); })
      .def_property_readonly("done", [](const Spelling& s) { return s.at >= s.constraint.size(); })
      .def_property_readonly("left", [](const Spelling& s) { return s.constraint.size() - std::min(s.at, s.constraint.size()); })
      .def("next", [](Spelling& s, int32_t token) { s.at += s.constraint.bytes_of(token); })
      .def("allowed", &Spelling::allowed);

  // Pieces of the text of tokens 0, 1, ..: [(ids, text)] as released after each token and at the end; the stop string found.
  m.def("cut_text", [](const TokenBytes& tokens, std::vector<std::string> stops, bool include_stop, int min_tokens, unsigned stop_at,
                       std::string before, std::string after, size_t typed, bool include_typed) {
    TextCut cut(&tokens, {std::move(stops), include_stop, min_tokens, stop_at, std::move(before), std::move(after)}, typed, include_typed);
    py::list pieces;
    bool ended = false;
    for (size_t i = 0; i <= tokens.size(); ++i) {
      if (i < tokens.size()) ended = cut.push(int32_t(i), -float(i));
      const bool last = ended || i == tokens.size();
      Piece piece;
      cut.release(last, &piece);
      if (last || !piece.tokens.empty()) pieces.append(py::make_tuple(piece.tokens, py::bytes(piece.text), piece.skipped));
      if (last) break;
    }
    return py::make_tuple(pieces, py::bytes(cut.matched()), cut.pushed());
  }, py::arg("tokens"), py::arg("stops") = std::vector<std::string>(), py::arg("include_stop") = false, py::arg("min_tokens") = 0,
     py::arg("stop_at") = 0, py::arg("before") = std::string(), py::arg("after") = std::string(), py::arg("typed") = 0,
     py::arg("include_typed") = false);
}
