// Where a request's output waits for its reader: a thread-safe queue shared by any number of requests.
#pragma once
#include <array>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/text.h"

namespace codefuse {

enum class Finish : uint8_t { none, eos, stop, length, time, cancelled, error, deadline };
constexpr int kFinishes = 8;

inline const char* name_of(Finish f) {
  static const char* const names[] = {"", "eos", "stop", "length", "time", "cancelled", "error", "deadline"};
  return names[size_t(f)];
}

// New output of one request.
struct Output {
  int64_t uid = 0;
  int index = 0;                 // 0, 1, ... per request, in the order of polling
  std::vector<int32_t> tokens;   // eos is not among them
  std::vector<float> logprobs;   // [tokens], empty unless asked for
  TopTokens top;                 // [tokens, top_per_token]
  int top_per_token = 0;
  std::string text;              // new text: bytes of tokens from text_start on, all of them except after a stop string
  int text_start = 0;
  Finish finish = Finish::none;  // not none in the last output of a request
  std::string stop;              // the stop string found, or "stop_at:" and the name of what ended the text
  std::string error;
  int input_tokens = 0;          // of the prompt, with those whose bytes the output began with
  std::array<int, 2> truncated_tokens{};  // lost by the text in front of the cursor and the one behind it
  int output_tokens = 0;         // so far, of new text
  int cached_tokens = 0;         // of the prompt, not computed again
  double cum_logprob = 0;        // of the output tokens so far
  double queue_s = 0;            // submit to first row
  double prefill_s = 0;          // first row to first token
  double decode_s = 0;           // first token to this output
};

class Outbox {
 public:
  void put(Output&& output);
  // Everything that has arrived, waiting for up to timeout_s seconds (negative: for ever) for something to arrive. Outputs of
  // one request are merged into one.
  std::vector<Output> poll(double timeout_s);
  // Wakes poll, which from now on does not wait; what arrives later is dropped.
  void close();
  bool closed() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<Output> waiting_;
  std::unordered_map<int64_t, size_t> place_;  // uid -> its output in waiting_
  std::unordered_map<int64_t, int> index_;     // uid -> index of its next output
  bool closed_ = false;
};

}  // namespace codefuse
