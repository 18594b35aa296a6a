#include "engine/text.h"

#include <algorithm>

namespace codefuse {

// Table 3-7 of the Unicode standard: well-formed byte sequences.
void Utf8Boundary::next(uint8_t b) {
  if (continues(b)) {
    --need_;
    low_ = 0x80, high_ = 0xbf;
    return;
  }
  need_ = b >= 0xc2 && b <= 0xdf ? 1 : b >= 0xe0 && b <= 0xef ? 2 : b >= 0xf0 && b <= 0xf4 ? 3 : 0;
  low_ = b == 0xe0 ? 0xa0 : b == 0xf0 ? 0x90 : 0x80;
  high_ = b == 0xed ? 0x9f : b == 0xf4 ? 0x8f : 0xbf;
}

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)), nodes_(1) {
  std::vector<int> depth(1, 0);
  for (size_t i = 0; i < stops_.size(); ++i) {
    int node = 0;
    for (char c : stops_[i]) {
      int to = child(node, uint8_t(c));
      if (to < 0) {
        to = int(nodes_.size());
        nodes_[size_t(node)].children.emplace_back(uint8_t(c), to);
        nodes_.emplace_back();
        depth.push_back(depth[size_t(node)] + 1);
      }
      node = to;
    }
    if (node != 0 && nodes_[size_t(node)].match < 0) nodes_[size_t(node)].match = int(i);
  }
  std::vector<int> order(1, 0);  // breadth first
  for (size_t i = 0; i < order.size(); ++i) {
    int node = order[i];
    for (auto [byte, to] : nodes_[size_t(node)].children) {
      order.push_back(to);
      Node& n = nodes_[size_t(to)];
      int fail = nodes_[size_t(node)].fail;
      while (fail != 0 && child(fail, byte) < 0) fail = nodes_[size_t(fail)].fail;
      int target = node == 0 ? -1 : child(fail, byte);
      n.fail = target < 0 ? 0 : target;
      if (n.match < 0) n.match = nodes_[size_t(n.fail)].match;
      n.held = n.children.empty() ? nodes_[size_t(n.fail)].held : depth[size_t(to)];
    }
  }
}

int StopMatcher::child(int node, uint8_t byte) const {
  for (auto [b, to] : nodes_[size_t(node)].children)
    if (b == byte) return to;
  return -1;
}

int StopMatcher::next(uint8_t byte) {
  int to = child(state_, byte);
  while (to < 0 && state_ != 0) {
    state_ = nodes_[size_t(state_)].fail;
    to = child(state_, byte);
  }
  state_ = to < 0 ? 0 : to;
  return nodes_[size_t(state_)].match;
}

void TopTokens::append(const TopTokens& more) {
  tokens.insert(tokens.end(), more.tokens.begin(), more.tokens.end());
  logprobs.insert(logprobs.end(), more.logprobs.begin(), more.logprobs.end());
}

namespace {

// The stop strings of end, that of its suffix behind them.
std::vector<std::string> stop_strings(TextEnd* end) {
  std::vector<std::string> stops = std::move(end->stops);
  if (end->at & kStopAtSuffix) stops.push_back(suffix_stop(end->after));
  if (!stops.empty() && stops.back().empty()) stops.pop_back();
  return stops;
}

}  // namespace

TextCut::TextCut(const TokenBytes* table, TextEnd end, size_t typed, bool include_typed)
    : table_(table),
      suffix_stop_(int(end.stops.size())),
      stops_(stop_strings(&end)),
      code_(end.at, end.before),
      include_stop_(end.include_stop),
      min_tokens_(end.min_tokens),
      typed_(typed),
      include_typed_(include_typed) {}

// How many bytes at the end of the text are cut off when it ends with this byte; -1 when it goes on.
int64_t TextCut::found(uint8_t byte, bool counts) {
  const int stop = stops_.next(byte);
  const bool at = code_.next(byte, counts);
  if (stop >= 0 && counts) {
    matched_ = stop == suffix_stop_ ? std::string("stop_at:suffix") : stops_.stop(stop);
    return include_stop_ ? 0 : int64_t(stops_.stop(stop).size());
  }
  if (!at) return -1;
  matched_ = std::string("stop_at:") + name_of(code_.reason());
  return code_.cut(include_stop_);
}

bool TextCut::push(int32_t token, float logprob, TopTokens top) {
  static const std::string none;
  const std::string& bytes = token >= 0 && size_t(token) < table_->size() ? (*table_)[size_t(token)] : none;
  const size_t typed = std::min(typed_, bytes.size());
  const bool all_typed = typed > 0 && typed == bytes.size();
  typed_ -= typed;
  if (all_typed && !include_typed_) return false;
  const bool counts = pushed_ >= min_tokens_;
  pushed_ += !all_typed;
  const size_t skipped = include_typed_ ? 0 : typed;
  if (bytes.size() > skipped && !pending_.empty() && !utf8_.continues(uint8_t(bytes[skipped]))) pending_.back().boundary = true;
  for (size_t i = skipped; i < bytes.size() && end_ < 0; ++i) {
    utf8_.next(uint8_t(bytes[i]));
    if (i < typed) continue;
    const int64_t cut = found(uint8_t(bytes[i]), counts);
    if (cut >= 0) end_ = length_ + int64_t(i - skipped) + 1 - cut;
  }
  length_ += int64_t(bytes.size() - skipped);
  pending_.push_back({token, logprob, length_, utf8_.at_boundary(), skipped, all_typed, std::move(top)});
  return end_ >= 0;
}

void TextCut::release(bool last, Piece* piece) {
  size_t count = 0;
  if (last) {
    // tokens that begin before the end of the text; one without bytes may stand at its end
    int64_t begin = released_;
    for (; count < pending_.size() && (end_ < 0 || begin < end_ || pending_[count].end == end_); ++count) begin = pending_[count].end;
  } else {
    int64_t safe = length_ - std::max(stops_.held(), code_.held());
    for (size_t i = 0; i < pending_.size() && pending_[i].end <= safe; ++i)
      if (pending_[i].boundary) count = i + 1;
  }
  for (size_t i = 0; i < count; ++i) {
    const Token& t = pending_[i];
    if (piece->tokens.empty()) piece->skipped = t.skipped;
    piece->tokens.push_back(t.id);
    piece->logprobs.push_back(t.logprob);
    piece->top.append(t.top);
    piece->typed += t.typed;
    int64_t size = (last && end_ >= 0 ? std::min(t.end, end_) : t.end) - released_;
    if (size > 0) piece->text.append((*table_)[size_t(t.id)], t.skipped, size_t(size));
    released_ = t.end;
  }
  pending_.erase(pending_.begin(), pending_.begin() + int64_t(count));
}

}  // namespace codefuse
