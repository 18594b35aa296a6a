// A small JSON reader for config.json and safetensors headers. Strict: one value, no duplicate keys, nesting up to 64.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/check.h"

namespace codefuse {

struct Json {
  enum class Kind : uint8_t { null, boolean, number, string, array, object };
  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> items;        // of an array, or the values of an object
  std::vector<std::string> keys;  // of an object, sorted; keys[i] belongs to items[i]

  bool is(Kind k) const { return kind == k; }
  const Json* find(const std::string& key) const;  // nullptr if absent
  bool is_integer() const;                         // a number without fraction, within +-2^53
  int64_t integer() const { return int64_t(number); }
  std::string shown() const;  // for messages: scalars as written, "an array", "an object"
};

// LoadError: `what` (a file name), the byte offset and the reason.
Json parse_json(const char* text, size_t size, const std::string& what);

}  // namespace codefuse
