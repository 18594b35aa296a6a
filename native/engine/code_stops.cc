#include "engine/code_stops.h"

#include <algorithm>
#include <cstring>

namespace codefuse {

namespace {

constexpr int kLongestPeriod = 512, kRepetitions = 6, kRepeatedBytes = 200;
constexpr int kSuffixBytes = 4;  // other than spaces
constexpr int kTab = 8;

bool is_space(uint8_t b) { return b == ' ' || b == '\t' || b == '\n' || b == '\r'; }
bool opens(uint8_t b) { return b == '(' || b == '[' || b == '{'; }
bool closes(uint8_t b) { return b == ')' || b == ']' || b == '}'; }

}  // namespace

std::string suffix_stop(const std::string& suffix) {
  int seen = 0;
  for (size_t i = 0; i < suffix.size(); ++i) {
    seen += !is_space(uint8_t(suffix[i]));
    const bool line_ends = i + 1 == suffix.size() || suffix[i + 1] == '\n' || suffix[i + 1] == '\r';
    if (seen >= kSuffixBytes && line_ends) return suffix.substr(0, i + 1);
  }
  return {};
}

int BracketDepth::next(uint8_t b) {
  if (b == '\n') quote_ = 0, escaped_ = false;
  if (quote_ != 0) {
    if (!escaped_ && b == quote_) quote_ = 0;
    escaped_ = !escaped_ && b == '\\';
    return 0;
  }
  if (b == '\'' || b == '"' || b == '`') quote_ = b;
  return opens(b) ? 1 : closes(b) ? -1 : 0;
}

void CodeStops::Line::next(uint8_t b) {
  if (blank && b == ' ') ++indent;
  if (blank && b == '\t') indent += kTab - indent % kTab;
  if (!is_space(b)) {
    blank = false;
    const bool after_code = last == 0 || opens(last) || closes(last) || last == ';' || last == ',' || last == ':';
    if ((b == '#' && is_space(previous)) || (b == '/' && previous == '/' && after_code)) comment = true;
    if (!comment && b != '/') last = b;  // one slash says nothing about a block
  }
  previous = b;
}

CodeStops::CodeStops(unsigned at, const std::string& before) : at_(at) {
  if (at_ & (kStopAtBracket | kStopAtBlock))
    for (char c : before) open_before_ = std::max(0, open_before_ + brackets_.next(uint8_t(c)));
  if (at_ & kStopAtBlock) set_block(before);
  if (at_ & kStopAtRepetition) {
    recent_.assign(kLongestPeriod, 0);
    repeated_.assign(kLongestPeriod + 1, 0);
  }
}

// The cursor's line, if something stands in it, else the line above it. A blank line above a cursor at its line's beginning ends
// what came before.
void CodeStops::set_block(const std::string& before) {
  size_t begin = before.rfind('\n') + 1;  // npos + 1 is 0
  for (size_t i = begin; i < before.size(); ++i) line_.next(uint8_t(before[i]));
  if (!line_.blank) {
    heading_ = true, heading_open_ = false;
    base_ = line_.indent;
    return;
  }
  const int typed = line_.indent;
  Line above;
  int blank_lines = -1;
  while (begin > 0 && above.blank) {
    const size_t end = begin - 1;
    begin = end == 0 ? 0 : before.rfind('\n', end - 1) + 1;
    above = Line();
    for (size_t i = begin; i < end; ++i) above.next(uint8_t(before[i]));
    ++blank_lines;
  }
  if (above.blank || (typed == 0 && blank_lines > 0)) return;
  heading_open_ = false;
  const bool left_it = typed > 0 && typed < above.indent;
  base_ = left_it ? typed : above.indent;
  deeper_ = !left_it && above.opens_block();
  braced_ = deeper_ && above.last == '{';
}

bool CodeStops::found(StopAt reason, int cut, int cut_included) {
  reason_ = reason;
  cut_ = cut;
  cut_included_ = cut_included;
  return true;
}

// byte is the first of its line that is no space.
bool CodeStops::dedent(uint8_t byte) const {
  if (open_ > 0) return false;
  if (braced_ && closes(byte) && line_.indent == base_) return false;
  return deeper_ ? line_.indent <= base_ : line_.indent < base_;
}

bool CodeStops::repetition(uint8_t byte) {
  bool endless = false;
  const int64_t n = size_ - 1;  // offset of byte
  for (int p = 1; p <= kLongestPeriod && p <= n; ++p) {
    int32_t& run = repeated_[size_t(p)];
    run = recent_[size_t((n - p) % kLongestPeriod)] == byte ? run + 1 : 0;
    endless |= run + p >= std::max(kRepetitions * p, kRepeatedBytes);
  }
  recent_[size_t(n % kLongestPeriod)] = byte;
  return endless;
}

bool CodeStops::next(uint8_t byte, bool counts) {
  if (at_ == 0) return false;
  ++size_;
  bool end = false;
  if ((at_ & kStopAtLine) && byte == '\n' && counts) end = found(kStopAtLine, previous_ == '\r' ? 2 : 1, 0);
  previous_ = byte;

  if ((at_ & kStopAtBlock) && byte == '\n') {
    if (heading_) {
      heading_ = false;
      deeper_ = line_.opens_block();
      braced_ = line_.last == '{';
    }
    line_ = Line();
    line_begin_ = size_;
  } else if (at_ & kStopAtBlock) {
    const bool first = line_.blank && !is_space(byte);
    if (first && heading_open_) {
      heading_ = true, heading_open_ = false;
      base_ = line_.indent;
    } else if (first && !heading_) {
      if (counts && dedent(byte)) end = found(kStopAtBlock, int(size_ - content_end_), int(size_ - line_begin_));
      if (closes(byte) && line_.indent == base_ && open_ == 0) braced_ = false;
    }
    line_.next(byte);
    if (!line_.blank && byte != '\r') content_end_ = size_;
  }

  if (at_ & (kStopAtBracket | kStopAtBlock)) {
    const int change = brackets_.next(byte);
    if (change < 0 && open_ == 0 && open_before_ > 0) {
      --open_before_;
      if ((at_ & kStopAtBracket) && counts && !end) end = found(kStopAtBracket, 1, 0);
    } else {
      open_ = std::max(0, open_ + change);
    }
  }
  if ((at_ & kStopAtRepetition) && repetition(byte) && counts && !end) end = found(kStopAtRepetition, 0, 0);
  return end;
}

int CodeStops::held() const {
  if ((at_ & kStopAtBlock) && line_.blank && !heading_ && !heading_open_) return int(size_ - content_end_);
  return (at_ & (kStopAtLine | kStopAtBlock)) && previous_ == '\r' ? 1 : 0;
}

}  // namespace codefuse
