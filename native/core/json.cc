#include "core/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

namespace codefuse {

namespace {

constexpr int kMaxDepth = 64;

class Parser {
 public:
  Parser(const char* text, size_t size, const std::string& what) : p_(text), begin_(text), end_(text + size), what_(what) {}

  Json document() {
    Json v = value(0);
    space();
    if (p_ != end_) fail("more text after the value");
    return v;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw LoadError(cat(what_, ": not valid JSON at byte ", p_ - begin_, ": ", why));
  }
  void space() {
    while (p_ != end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) ++p_;
  }
  char peek() const { return p_ == end_ ? '\0' : *p_; }
  void expect(char c) {
    if (peek() != c || p_ == end_) fail(cat("expected '", c, "'"));
    ++p_;
  }
  bool literal(const char* word, size_t n) {
    if (size_t(end_ - p_) < n || !std::equal(word, word + n, p_)) return false;
    p_ += n;
    return true;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    space();
    Json v;
    switch (peek()) {
      case '{': object(v, depth); break;
      case '[': array(v, depth); break;
      case '"':
        v.kind = Json::Kind::string;
        v.string = text();
        break;
      default:
        if (literal("null", 4)) break;
        if (literal("true", 4) || literal("false", 5)) {
          v.kind = Json::Kind::boolean;
          v.boolean = p_[-2] == 'u';
          break;
        }
        number(v);
    }
    return v;
  }

  void number(Json& v) {
    if (peek() != '-' && (peek() < '0' || peek() > '9')) fail("expected a value");
    auto [rest, error] = std::from_chars(p_, end_, v.number);
    if (error != std::errc() || !std::isfinite(v.number)) fail("expected a number");
    p_ = rest;
    v.kind = Json::Kind::number;
  }

  void array(Json& v, int depth) {
    v.kind = Json::Kind::array;
    expect('[');
    space();
    if (peek() == ']') return expect(']');
    for (;;) {
      v.items.push_back(value(depth + 1));
      space();
      if (peek() != ',') return expect(']');
      ++p_;
    }
  }

  void object(Json& v, int depth) {
    v.kind = Json::Kind::object;
    std::vector<std::string> keys;
    std::vector<Json> items;
    expect('{');
    space();
    if (peek() == '}') return expect('}');
    for (;;) {
      space();
      keys.push_back(text());
      space();
      expect(':');
      items.push_back(value(depth + 1));
      space();
      if (peek() != ',') break;
      ++p_;
    }
    expect('}');
    std::vector<size_t> order(keys.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] < keys[b]; });
    for (size_t i : order) {
      if (!v.keys.empty() && v.keys.back() == keys[i]) fail(cat("key '", keys[i], "' appears twice"));
      v.keys.push_back(std::move(keys[i]));
      v.items.push_back(std::move(items[i]));
    }
  }

  uint32_t hex4() {
    uint32_t code = 0;
    auto [rest, error] = std::from_chars(p_, std::min(end_, p_ + 4), code, 16);
    if (error != std::errc() || rest != p_ + 4) fail("expected four hexadecimal digits");
    p_ += 4;
    return code;
  }

  void append_utf8(std::string& out, uint32_t c) {
    if (c < 0x80) {
      out += char(c);
    } else if (c < 0x800) {
      out += {char(0xC0 | c >> 6), char(0x80 | (c & 63))};
    } else if (c < 0x10000) {
      out += {char(0xE0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
    } else {
      out += {char(0xF0 | c >> 18), char(0x80 | (c >> 12 & 63)), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
    }
  }

  // The rest of a character of several bytes, whose first is already in out; messages must stay valid UTF-8.
  void continuation(uint8_t first, std::string& out) {
    const int more = first >= 0xC2 && first < 0xE0 ? 1 : first >= 0xE0 && first < 0xF0 ? 2 : first >= 0xF0 && first < 0xF5 ? 3 : 0;
    if (more == 0 || end_ - p_ < more) fail("not UTF-8");
    const uint8_t second = uint8_t(*p_);
    const uint8_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80, high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (second < low || second > high) fail("not UTF-8");
    for (int i = 0; i < more; ++i) {
      if ((uint8_t(*p_) & 0xC0) != 0x80) fail("not UTF-8");
      out += *p_++;
    }
  }

  std::string text() {
    expect('"');
    std::string out;
    for (;;) {
      if (p_ == end_) fail("a string does not end");
      char c = *p_++;
      if (c == '"') return out;
      if (uint8_t(c) < 0x20) fail("a control character in a string");
      if (c != '\\') {
        out += c;
        if (uint8_t(c) >= 0x80) continuation(uint8_t(c), out);
        continue;
      }
      char e = peek();
      ++p_;
      switch (e) {
        case '"': case '\\': case '/': out += e; break;
        case 'b': out += '\b'; break;
        case 'f': out += '\f'; break;
        case 'n': out += '\n'; break;
        case 'r': out += '\r'; break;
        case 't': out += '\t'; break;
        case 'u': {
          uint32_t code = hex4();
          if (code >= 0xD800 && code < 0xDC00 && literal("\\u", 2)) {
            uint32_t low = hex4();
            if (low < 0xDC00 || low > 0xDFFF) fail("an unpaired surrogate");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
          } else if (code >= 0xD800 && code < 0xE000) {
            code = 0xFFFD;
          }
          append_utf8(out, code);
          break;
        }
        default: --p_; fail("an unknown escape");
      }
    }
  }

  const char* p_;
  const char* begin_;
  const char* end_;
  const std::string& what_;
};

}  // namespace

const Json* Json::find(const std::string& key) const {
  auto at = std::lower_bound(keys.begin(), keys.end(), key);
  return at == keys.end() || *at != key ? nullptr : &items[size_t(at - keys.begin())];
}

bool Json::is_integer() const { return is(Kind::number) && number == std::floor(number) && std::fabs(number) <= 9007199254740992.0; }

std::string Json::shown() const {
  switch (kind) {
    case Kind::null: return "null";
    case Kind::boolean: return boolean ? "true" : "false";
    case Kind::number: return is_integer() ? cat(integer()) : cat(number);
    case Kind::string: return cat('"', string, '"');
    case Kind::array: return "an array";
    case Kind::object: return "an object";
  }
  return "";
}

Json parse_json(const char* text, size_t size, const std::string& what) { return Parser(text, size, what).document(); }

}  // namespace codefuse
