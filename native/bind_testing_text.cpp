// Beam search, the spelling of a prefix and the text cut, each alone.
#include <pybind11/stl.h>

#include <deque>

#include "bind_testing.h"
#include "engine/bad_words.h"
#include "engine/beam_search.h"
#include "engine/prefix_constraint.h"
#include "engine/text.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

// A vocabulary and bytes to be spelled with it.
struct Spelling {
  Spelling(TokenBytes tokens, const std::vector<int32_t>& never, int vocab, std::string bytes)
      : table(std::move(tokens)), trie(&table, tokens_by_bytes(table, vocab), never), constraint(&trie, std::move(bytes)), words(size_t(vocab + 31) / 32) {}
  Spelling(const Spelling&) = delete;
  std::vector<int32_t> allowed() const {
    std::vector<uint32_t> mask(words, 0);
    constraint.allow(at, mask.data());
    std::vector<int32_t> ids;
    for (size_t t = 0; t < words * 32; ++t)
      if (mask[t / 32] >> (t % 32) & 1) ids.push_back(int32_t(t));
    return ids;
  }

  TokenBytes table;
  TokenTrie trie;
  PrefixConstraint constraint;
  size_t words;
  size_t at = 0;  // bytes spelled
};

}  // namespace

void bind_testing_text(py::module_& m) {
  // Tokens have the bytes of token_bytes; next: per running beam (tokens, log-probs).
  py::class_<BeamSearch>(m, "BeamSearch")
      .def(py::init([](int width, float length_penalty, float diversity_rate, bool early_stopping, int max_tokens, std::vector<int32_t> end_ids,
                       const TokenBytes& token_bytes, std::vector<std::string> stops) {
        static std::deque<TokenBytes> tables;  // which texts refer to
        tables.push_back(token_bytes);
        return std::make_unique<BeamSearch>(BeamOptions{width, width, length_penalty, diversity_rate, early_stopping}, max_tokens, std::move(end_ids),
                                            TextCut(&tables.back(), {std::move(stops)}));
      }), py::kw_only(), py::arg("width"), py::arg("length_penalty") = 1.f, py::arg("diversity_rate") = 0.f, py::arg("early_stopping") = false,
           py::arg("max_tokens"), py::arg("end_ids") = std::vector<int32_t>(), py::arg("token_bytes") = TokenBytes(),
           py::arg("stops") = std::vector<std::string>())
      .def_static("candidates", &BeamSearch::candidates, py::arg("width"), py::arg("end_ids"))
      .def("advance", [](BeamSearch& s, const std::vector<std::pair<std::vector<int32_t>, std::vector<float>>>& next) {
        std::vector<TopTokens> tops;
        for (auto& [tokens, logprobs] : next) tops.push_back({tokens, logprobs});
        return s.advance(tops);
      })
      .def_property_readonly("running", [](const BeamSearch& s) {
        py::list out;
        for (const BeamSearch::Beam& b : s.running()) out.append(py::make_tuple(b.tokens, b.score));
        return out;
      })
      .def_property_readonly("finished", [](BeamSearch& s) {
        py::list out;
        for (const BeamSearch::Beam& b : s.finished()) out.append(py::make_tuple(b.tokens, b.score, name_of(b.finish)));
        return out;
      });

  py::class_<Spelling>(m, "Spelling")
      .def(py::init<TokenBytes, const std::vector<int32_t>&, int, std::string>(), py::arg("tokens"), py::arg("never"), py::arg("vocab"),
           py::arg("bytes"))
      .def_property_readonly("possible", [](const Spelling& s) { return s.constraint.possible(); })
      .def_property_readonly("done", [](const Spelling& s) { return s.at >= s.constraint.size(); })
      .def_property_readonly("left", [](const Spelling& s) { return s.constraint.size() - std::min(s.at, s.constraint.size()); })
      .def("next", [](Spelling& s, int32_t token) { s.at += s.constraint.bytes_of(token); })
      .def("allowed", &Spelling::allowed);

  // Pieces of the text of tokens 0, 1, ..: [(ids, text)] as released after each token and at the end; the stop string found.
  m.def("cut_text", [](const TokenBytes& tokens, std::vector<std::string> stops, bool include_stop, int min_tokens, unsigned stop_at,
                       std::string before, std::string after, size_t typed, bool include_typed) {
    TextCut cut(&tokens, {std::move(stops), include_stop, min_tokens, stop_at, std::move(before), std::move(after)}, typed, include_typed);
    py::list pieces;
    bool ended = false;
    for (size_t i = 0; i <= tokens.size(); ++i) {
      if (i < tokens.size()) ended = cut.push(int32_t(i), -float(i));
      const bool last = ended || i == tokens.size();
      Piece piece;
      cut.release(last, &piece);
      if (last || !piece.tokens.empty()) pieces.append(py::make_tuple(piece.tokens, py::bytes(piece.text), piece.skipped));
      if (last) break;
    }
    return py::make_tuple(pieces, py::bytes(cut.matched()), cut.pushed());
  }, py::arg("tokens"), py::arg("stops") = std::vector<std::string>(), py::arg("include_stop") = false, py::arg("min_tokens") = 0,
     py::arg("stop_at") = 0, py::arg("before") = std::string(), py::arg("after") = std::string(), py::arg("typed") = 0,
     py::arg("include_typed") = false);
}
