// From sampled tokens to released text, on bytes: where a stop string ends the text, and how much of it may go out now.
// Text is released in whole tokens that end between two characters and cannot be part of a stop string.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

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
};

// The output text of one request.
class TextCut {
 public:
  // Matches that end within the first min_tokens tokens do not count. include_stop: the text ends after the stop string
  // that was found, otherwise before it.
  TextCut(const TokenBytes* table, std::vector<std::string> stops, bool include_stop, int min_tokens);

  // Adds a token; true when the text ends in it.
  bool push(int32_t token, float logprob, TopTokens top = {});
  // Moves what may go out now into piece; with `last` all that belongs to the text. Tokens that begin behind the end of
  // the text are dropped.
  void release(bool last, Piece* piece);

  int pushed() const { return pushed_; }
  const std::string& matched() const { return matched_; }  // stop string found, or empty

 private:
  struct Token {
    int32_t id;
    float logprob;
    int64_t end;    // offset of its end in the text
    bool boundary;  // a character ends there
    TopTokens top;
  };

  const TokenBytes* table_;
  StopMatcher stops_;
  Utf8Boundary utf8_;
  bool include_stop_;
  int min_tokens_;
  int pushed_ = 0;
  std::vector<Token> pending_;
  int64_t released_ = 0, length_ = 0;  // bytes released, bytes seen
  int64_t end_ = -1;                   // end of the text, once a stop string was found
  std::string matched_;
};

}  // namespace codefuse
