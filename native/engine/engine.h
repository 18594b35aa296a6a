// The serving loop: requests in, outputs to their outboxes, one thread that keeps the device busy.
#pragma once
#include <array>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <queue>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/check.h"
#include "engine/bad_words.h"
#include "engine/beam_search.h"
#include "engine/outbox.h"
#include "engine/prefix_constraint.h"
#include "engine/scheduler.h"
#include "engine/sessions.h"
#include "engine/text.h"
#include "engine/token_rules.h"
#include "model/runner.h"

namespace codefuse {

struct QueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct EngineOptions {
  int prefill_rows = 512;  // prompt tokens of one step at most
  int queue = 256;         // requests that may wait beyond those that have a slot
  int depth = 0;           // steps in flight: 2 launches a step before the results of the one before are read, 1 does not;
                           // 0: 1 on the CPU, where launch() computes, else 2
  std::string prefix_cache = "on";  // "off"; "on": K and V are reused where that changes no bit of a result; "generated": those of generated tokens too,
                                    // as a prompt's, on devices where rows of prompts round differently
};

struct Request {
  std::vector<int32_t> prompt;
  std::string prefix;             // the end of the prompt in bytes, where its tokens are not certain: the output begins with them
  bool include_typed = false;     // leave them in the text; otherwise they are not part of it
  std::vector<int32_t> prefix_ids;  // the tokens of prefix as the prompt's last ones: counted as such; may be empty
  std::array<int, 2> truncated_tokens{};  // that the prompt's text and its suffix lost, to be reported
  int max_tokens = 128;           // of new text
  int max_time_ms = 0;            // since submit; 0: no limit
  SampleParams sample;
  LogitBias logit_bias;
  Penalties penalties;
  BeamOptions beams;
  std::vector<std::string> bad_words;  // bytes that prompt and text do not contain where they meet or after; none empty
  std::vector<std::string> stop;  // bytes; none empty
  bool include_stop = false;
  unsigned stop_at = 0;           // of StopAt
  std::string before, after;      // text in front of the cursor and behind it, for stop_at
  std::vector<int32_t> eos_ids;
  int min_tokens = 0;             // eos is not sampled before, stop strings do not end the text
  bool stream = true;             // false: only the last output is delivered
  bool logprobs = false;
  std::shared_ptr<const WordList> word_list;  // of bad_words; made by submit
  RuleList rules;                 // what else decides about its tokens; they pass to the scheduler
  std::string cache_salt;         // requests of different salts share nothing that was computed
  std::string session;            // not empty: cancels what came before it of the same session and salt,
  int64_t beside = 0;             // except requests that came together: uid of the first of them, 0: this is the first
  int deadline_ms = 0;            // ends with Finish::deadline when its first token has not come so long after submit(); 0: never
  std::shared_ptr<Outbox> outbox;
};

struct EngineStats {
  int running = 0, waiting = 0, slots = 0, queue = 0, pages = 0;
  int free_pages = 0;    // that no request holds
  int cached_pages = 0;  // those among them that the prefix cache has filled
  int64_t steps = 0, prefill_tokens = 0, decode_tokens = 0;  // decode_tokens: sampled tokens that a request used
  int64_t cached_tokens = 0;  // of prompts, not computed again; those computed again after a preemption do not count
  int64_t evictions = 0;      // pages that the prefix cache gave up
  int64_t wasted_rows = 0;   // samples of sequences that had ended
  int64_t preemptions = 0;
  double step_s = 0;         // moving average
  int64_t submitted = 0, refused = 0;
  int64_t finished[kFinishes] = {};  // by Finish
  std::string error;         // not empty: the device failed and nothing more is served
};

// The end-of-text token that ends a request is neither delivered nor counted. Tokens that lie wholly behind a stop string's
// cut are not delivered either.
class Engine {
 public:
  // never_text: tokens that have bytes, but are not what typed text is completed to.
  Engine(std::unique_ptr<Runner> runner, TokenBytes token_bytes, const std::vector<int32_t>& never_text, const EngineOptions& options);
  ~Engine();
  static void check(const EngineOptions& options);  // ValueError; before a long load

  const Runner& runner() const { return *runner_; }

  // Uid of the request, positive and unique; with beams those of its beams.count texts are uid, uid + 1, .. and cancelling one cancels all.
  // ValueError; QueueFull; DeviceError after a failure; runtime_error when closed.
  int64_t submit(Request request);
  // False when there is no such request or it has ended. The last output of a cancelled request has Finish::cancelled.
  bool cancel(int64_t uid);
  EngineStats stats() const;
  // Admits nothing more, lets requests finish for up to drain_s seconds, cancels the rest, ends the thread. May be repeated, which may
  // shorten the time that others give them.
  void close(double drain_s);

 private:
  using Clock = std::chrono::steady_clock;
  struct Live {
    Live(int64_t uid, Request&& request, const TokenBytes* table);
    int64_t uid;
    const std::string session;  // key in Sessions
    int64_t supersedes = 0;     // the first request of its session that it has made stale; 0: none
    Request request;
    TextCut text;
    Piece piece;  // released, not delivered: all of it until the end when not streaming
    Clock::time_point submitted, started{}, first{};
    int chosen = 0, most = 0;  // tokens of the sequence, and at most
    int output_tokens = 0;
    int cached_tokens = 0;
    double cum_logprob = 0;
    std::unique_ptr<BeamSearch> beams;  // with beams, else nullptr
    std::vector<TopTokens> next;        // [beams that run] what may follow them, of those whose row has been computed
    int missing = 0;                    // the others
  };

  void validate(const Request& r) const;
  void add_rules(Request& r) const;
  void validate_beams(const Request& r) const;
  void run_beams(Live& live);
  void take_beam(int64_t row, const int32_t* tokens, const float* logprobs);
  void stop_beams(const Live& live);
  void deliver_beams(Live& live, Finish finish, const std::string& error);
  void run();
  void serve();
  void replace_unseen(const std::vector<int64_t>& stale, std::unique_ptr<Live> live, std::vector<std::unique_ptr<Live>>* unseen);
  void add(Live& live);
  void forget(const Live& live, Finish finish);
  void deliver_all(Live& live, Finish finish, const std::string& error);
  void copy_stats();     // the scheduler's; mutex_ is held
  bool take_commands();  // false: the thread is to end
  void forget_deadlines();
  void end_late();       // what has run for longer than it may, or has no token in time
  bool launch();         // false: nothing to run now
  void collect();
  void advance(Live& live, int32_t token, float logprob, TopTokens top);
  void end(int64_t uid, Finish finish, const std::string& error = "");
  void end_all(Finish finish, const std::string& error);
  void deliver(Live& live, Finish finish, const std::string& error);

  std::unique_ptr<Runner> runner_;
  TokenBytes token_bytes_;
  std::vector<int32_t> tokens_by_bytes_;
  TokenTrie trie_;
  EngineOptions options_;
  int depth_;

  // the engine thread's own
  Scheduler scheduler_;
  std::unordered_map<int64_t, std::unique_ptr<Live>> live_;
  std::unordered_map<int64_t, std::pair<int64_t, size_t>> beam_rows_;  // the scheduler's uid of a beam's row, negative -> request, beam
  int64_t next_beam_row_ = -1;
  using Late = std::pair<int64_t, Finish>;  // uid, how it ends; deadline: unless it has a token by then
  using Deadline = std::pair<Clock::time_point, Late>;
  std::priority_queue<Deadline, std::vector<Deadline>, std::greater<Deadline>> deadlines_;  // those of ended requests too
  Batch batches_[2];
  Step steps_[2];
  Clock::time_point launched_[2];
  Clock::time_point collected_{};
  int64_t launches_ = 0, collects_ = 0;
  size_t used_[kDecodeRows];  // samples of the collected step whose sequence still runs

  // shared
  mutable std::mutex mutex_;
  std::condition_variable wake_;    // for the engine thread: a command or the end
  std::condition_variable drained_; // for close: no request is alive, or no longer waited for
  std::vector<std::unique_ptr<Live>> incoming_;
  std::vector<int64_t> cancels_;
  std::unordered_map<int64_t, int64_t> alive_;  // submitted and not ended -> the first uid of the request
  Sessions sessions_;
  int64_t next_uid_ = 1;
  bool closing_ = false, stop_ = false;
  std::string error_;
  EngineStats stats_;  // the scheduler's figures as of the last step

  std::mutex close_mutex_;
  std::thread thread_;
};

}  // namespace codefuse
