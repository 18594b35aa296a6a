// Places at which code that was asked for in part is complete, found in the text byte by byte. No language is parsed: what tells
// them are line ends, indentation, brackets outside of quotes, and repetition.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace codefuse {

// What ends a text, besides stop strings; kStopAtNames are the names in requests, a result says "stop_at:NAME".
enum StopAt : unsigned {
  kStopAtLine = 1,         // before the first line end
  kStopAtBlock = 2,        // behind the last line of the indented block that the cursor is in or opens
  kStopAtBracket = 4,      // before the bracket that closes the innermost one that is open at the cursor
  kStopAtSuffix = 8,       // before the text begins to say what stands behind the cursor (suffix_stop)
  kStopAtRepetition = 16,  // when at least 6 times and 200 bytes nothing but the same up to 512 bytes has come
};
constexpr const char* kStopAtNames[] = {"line", "block", "bracket", "suffix", "repetition"};
inline const char* name_of(StopAt at) {
  int i = 0;
  while (1u << i != unsigned(at)) ++i;
  return kStopAtNames[i];
}

// The stop string of kStopAtSuffix: the beginning of suffix up to the end of the line in which 4 bytes other than spaces are
// reached; empty when there are fewer.
std::string suffix_stop(const std::string& suffix);

// Brackets that are open, quoted ones not counted. A quote ends with its line at the latest: an apostrophe in a comment hides little.
class BracketDepth {
 public:
  // Change of the depth by one more byte: 1, -1 or 0.
  int next(uint8_t byte);

 private:
  uint8_t quote_ = 0;
  bool escaped_ = false;
};

class CodeStops {
 public:
  // at: of StopAt, kStopAtSuffix means nothing here. before: the text up to the cursor.
  CodeStops(unsigned at, const std::string& before);

  // Takes one more byte of the text; true when the text ends, its last cut() bytes not being part of it. A stop that does not
  // count passes.
  bool next(uint8_t byte, bool counts);
  int cut(bool include_stop) const { return include_stop ? cut_included_ : cut_; }
  StopAt reason() const { return reason_; }
  // Bytes at the end of the text that may still be cut off.
  int held() const;

 private:
  // One line as it goes on.
  struct Line {
    int indent = 0;  // columns; a tab goes on to the next multiple of 8
    bool blank = true, comment = false;
    uint8_t previous = '\n';
    uint8_t last = 0;  // byte of the code other than a space
    void next(uint8_t byte);
    bool opens_block() const { return last == ':' || last == '{'; }
  };

  void set_block(const std::string& before);
  bool found(StopAt reason, int cut, int cut_included);
  bool dedent(uint8_t byte) const;
  bool repetition(uint8_t byte);

  unsigned at_;
  StopAt reason_ = kStopAtLine;
  int cut_ = 0, cut_included_ = 0;
  uint8_t previous_ = 0;

  BracketDepth brackets_;
  int open_before_ = 0;  // brackets opened before the cursor
  int open_ = 0;         // and behind it

  Line line_;
  bool heading_ = false;      // the line is the one that says how far the block is indented
  bool heading_open_ = true;  // no such line has come yet: the next one that is not blank is it
  int base_ = 0;              // columns of that line
  bool deeper_ = false;       // the block is what is indented deeper than it
  bool braced_ = false;       // and a closing bracket below it still belongs to it
  int64_t size_ = 0;          // bytes of the text
  int64_t content_end_ = 0;   // end of the last line that is not blank, without its line end
  int64_t line_begin_ = 0;

  std::vector<uint8_t> recent_;   // [kLongestPeriod] ring of the last bytes
  std::vector<int32_t> repeated_; // [kLongestPeriod + 1] by period p: how many of the last bytes equal the one p before
};

}  // namespace codefuse
