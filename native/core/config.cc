#include "core/config.h"

#include <cmath>
#include <initializer_list>
#include <utility>

#include "core/check.h"
#include "core/json.h"

namespace codefuse {

namespace {

constexpr int kMaxSize = 1 << 24;  // any dimension: products of two fit int64 with room

// Typed access to the keys of one JSON object.
class Fields {
 public:
  Fields(const Json& object, std::string path) : object_(object), path_(std::move(path)) {
    if (!object.is(Json::Kind::object)) throw LoadError(cat(path_, ": expected a JSON object, found ", object.shown()));
  }

  [[noreturn]] void fail(const std::string& key, const std::string& found, const std::string& expected) const {
    throw LoadError(cat(path_, ": ", key, " is ", found, "; expected ", expected));
  }

  const Json& at(const std::string& key, const std::string& expected) const {
    const Json* v = object_.find(key);
    if (!v) throw LoadError(cat(path_, ": ", key, " is missing; expected ", expected));
    return *v;
  }

  int integer(const std::string& key, int low, int high) const {
    const std::string expected = cat("an integer from ", low, " to ", high);
    const Json& v = at(key, expected);
    if (!v.is_integer() || v.integer() < low || v.integer() > high) fail(key, v.shown(), expected);
    return int(v.integer());
  }

  // above 0, at most `high`
  float positive(const std::string& key, double high) const {
    const std::string expected = cat("a number above 0, at most ", high);
    const Json& v = at(key, expected);
    if (!v.is(Json::Kind::number) || !(v.number > 0) || v.number > high) fail(key, v.shown(), expected);
    return float(v.number);
  }

  bool boolean(const std::string& key) const {
    const Json& v = at(key, "true or false");
    if (!v.is(Json::Kind::boolean)) fail(key, v.shown(), "true or false");
    return v.boolean;
  }

  std::string text(const std::string& key) const {
    const Json& v = at(key, "a string");
    if (!v.is(Json::Kind::string)) fail(key, v.shown(), "a string");
    return v.string;
  }

  template <class T>
  T one_of(const std::string& key, std::initializer_list<std::pair<const char*, T>> names) const {
    std::string expected;
    for (auto& n : names) expected += cat(expected.empty() ? "" : " or ", '"', n.first, '"');
    const Json& v = at(key, expected);
    if (v.is(Json::Kind::string))
      for (auto& n : names)
        if (v.string == n.first) return n.second;
    fail(key, v.shown(), expected);
  }

 private:
  const Json& object_;
  std::string path_;
};

}  // namespace

ModelConfig parse_model_config(const std::string& json_text, const std::string& path) {
  const Json json = parse_json(json_text.data(), json_text.size(), path);
  const Fields f(json, path);
  if (!json.find("format_version"))
    for (const char* key : {"architectures", "model_type"})
      if (json.find(key))
        throw LoadError(cat(path, ": has ", key, ", so it is a Hugging Face config; expected that of a weights directory, which tools/convert.py makes from it"));
  f.integer("format_version", 1, 1);

  ModelConfig c;
  c.architecture = f.text("architecture");
  c.vocab = f.integer("vocab", 1, 1 << 23);
  c.hidden = f.integer("hidden", 1, kMaxSize);
  c.layers = f.integer("layers", 1, 4096);
  c.heads = f.integer("heads", 1, 65536);
  c.kv_heads = f.integer("kv_heads", 1, c.heads);
  if (c.heads % c.kv_heads) f.fail("kv_heads", cat(c.kv_heads), cat("a divisor of heads, ", c.heads));
  c.head_dim = f.integer("head_dim", 1, 1024);
  c.intermediate = f.integer("intermediate", 1, kMaxSize);
  c.max_positions = f.integer("max_positions", 1, kMaxSize);
  c.norm = f.one_of<NormKind>("norm", {{"layer", NormKind::layer}, {"rms", NormKind::rms}});
  c.norm_eps = f.positive("norm_eps", 1);
  c.residual = f.one_of<ResidualKind>("residual", {{"serial", ResidualKind::serial},
                                                   {"parallel_one_norm", ResidualKind::parallel_one_norm},
                                                   {"parallel_two_norms", ResidualKind::parallel_two_norms}});
  c.activation = f.one_of<Activation>("activation", {{"gelu", Activation::gelu},
                                                     {"gelu_tanh", Activation::gelu_tanh},
                                                     {"relu", Activation::relu},
                                                     {"silu", Activation::silu}});
  c.gated = f.boolean("gated");
  c.position = f.one_of<PositionKind>("position", {{"rope", PositionKind::rope}, {"learned", PositionKind::learned}});
  if (c.position == PositionKind::rope) {
    c.rope_dim = f.integer("rope_dim", 0, c.head_dim);
    if (c.rope_dim % 2) f.fail("rope_dim", cat(c.rope_dim), cat("an even number up to head_dim, ", c.head_dim));
    c.rope_theta = f.positive("rope_theta", 1e12);
    const Fields scaling(f.at("rope_scaling", "an object with a type"), path + ": rope_scaling");
    if (scaling.one_of<bool>("type", {{"none", false}, {"linear", true}})) c.rope_scale = scaling.positive("factor", 1e6);
  }
  c.tied = f.boolean("tied");
  c.window = f.integer("window", 0, kMaxSize);
  c.bos_id = f.integer("bos_id", -1, c.vocab - 1);
  const Json& eos = f.at("eos_ids", "an array of token ids");
  if (!eos.is(Json::Kind::array)) f.fail("eos_ids", eos.shown(), "an array of token ids");
  for (const Json& id : eos.items) {
    if (!id.is_integer() || id.integer() < 0 || id.integer() >= c.vocab)
      f.fail("eos_ids", cat("an array with ", id.shown()), cat("token ids from 0 to ", c.vocab - 1));
    c.eos_ids.push_back(int(id.integer()));
  }
  return c;
}

}  // namespace codefuse
