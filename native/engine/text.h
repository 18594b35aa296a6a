// From sampled tokens to released text, on bytes: where a stop string ends the text, and how much of it may go out now.
// Text is released in whole tokens that end between two characters and cannot be part of a stop string.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/code_stops.h"

namespace codefuse {

// Bytes of every token id; ids beyond the table have none.
using TokenBytes = std::vector<std::string>;

// Tells where UTF-8 text may be cut so that decoding the parts with U+FFFD for ill-formed bytes equals decoding the whole:
// everywhere except inside a sequence that is well-formed so far. A byte that does not continue the sequence before it makes
// the place in front of it a boundary, so at most 3 bytes are behind the last boundary.
class Utf8Boundary {
 public:
  void next(uint8_t byte);
  bool continues(uint8_t byte) const { return need_ > 0 && byte >= low_ && byte <= high_; }
  bool at_boundary() const { return need_ == 0; }

 private:
  int need_ = 0;  // continuation bytes still expected
  uint8_t low_ = 0x80, high_ = 0xbf;
};

// Finds stop strings in a byte stream (Aho-Corasick). Of all occurrences the one that ends first counts, and of those that
// end there the longest; no byte after it is needed to decide.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops = {});

  // Index of the stop string that ends with this byte, or -1.
  int next(uint8_t byte);
  // Bytes at the end of the stream that could become part of a match.
  int held() const { return nodes_[size_t(state_)].held; }
  const std::string& stop(int i) const { return stops_[size_t(i)]; }

 private:
  struct Node {
    std::vector<std::pair<uint8_t, int>> children;
    int fail = 0;
    int match = -1;  // longest stop string that is a suffix of this node's
    int held = 0;    // longest suffix of this node's string that a stop string continues
  };
  int child(int node, uint8_t byte) const;

  std::vector<std::string> stops_;
  std::vector<Node> nodes_;
  int state_ = 0;
};

// The most likely tokens in the place of one or more tokens, as many for each.
struct TopTokens {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  void append(const TopTokens& more);
};

// Tokens released together.
struct Piece {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;  // [tokens]
  TopTokens top;                // [tokens, as many as were pushed with each]
  std::string text;             // the bytes of tokens; in the last piece possibly less than all of the last token
  size_t skipped = 0;           // bytes of the first token in front of text: the end of what was typed
  size_t typed = 0;             // tokens that lie wholly in what was typed; with include_typed only
};

// What ends the text of one request.
struct TextEnd {
  std::vector<std::string> stops;  // bytes; none empty
  bool include_stop = false;       // the text ends after the stop string that was found, otherwise before it
  int min_tokens = 0;              // what is found within so many tokens does not count
  unsigned at = 0;                 // of StopAt
  std::string before, after;       // the text in front of the cursor and behind it, for `at`
};

// The output text of one request.
class TextCut {
 public:
  // typed: bytes at the beginning of the output that belong to the prompt. Stop strings are looked for behind them, tokens that
  // lie wholly in them do not count. They are no part of the text and their tokens of no piece, unless include_typed.
  TextCut(const TokenBytes* table, TextEnd end, size_t typed = 0, bool include_typed = false);

  // Adds a token; true when the text ends in it.
  bool push(int32_t token, float logprob, TopTokens top = {});
  // Moves what may go out now into piece; with `last` all that belongs to the text. Tokens that begin behind the end of
  // the text are dropped.
  void release(bool last, Piece* piece);

  int pushed() const { return pushed_; }  // tokens that count
  bool typing() const { return typed_ > 0; }  // typed bytes are still to come
  // The stop string found, or "stop_at:" and the name of what was; empty before.
  const std::string& matched() const { return matched_; }

 private:
  struct Token {
    int32_t id;
    float logprob;
    int64_t end;    // offset of its end in the text
    bool boundary;  // a character ends there
    size_t skipped;  // its bytes in front of the text
    bool typed;      // it lies wholly in what was typed
    TopTokens top;
  };

  int64_t found(uint8_t byte, bool counts);

  const TokenBytes* table_;
  int suffix_stop_;  // index of the stop string that the suffix makes, if it makes one
  StopMatcher stops_;
  CodeStops code_;
  Utf8Boundary utf8_;
  bool include_stop_;
  int min_tokens_;
  size_t typed_;  // typed bytes still to come
  bool include_typed_;
  int pushed_ = 0;
  std::vector<Token> pending_;
  int64_t released_ = 0, length_ = 0;  // bytes released, bytes seen
  int64_t end_ = -1;                   // end of the text, once a stop string was found
  std::string matched_;
};

}  // namespace codefuse
