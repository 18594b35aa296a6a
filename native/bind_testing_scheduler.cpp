// The scheduler under a script, its pages and its prefix cache.
#include <pybind11/stl.h>

#include <map>

#include "bind_testing.h"
#include "engine/scheduler.h"

namespace py = pybind11;
using namespace codefuse;

namespace {

// Waits for the first `waiting` tokens. Token number i gets the edit (i, tokens known), and the mask of token `tokens known` while it waits.
class ScriptedRule final : public LogitRules {
 public:
  ScriptedRule(int waiting, int vocab) : waiting_(waiting), vocab_(vocab) {}
  bool waits(const std::vector<int32_t>& generated) override { return int(generated.size()) < waiting_; }
  void prepare(const std::vector<int32_t>& generated, int index, LogitChanges* changes) override {
    changes->edit(index, float(generated.size()));
    if (index >= waiting_) return;
    std::vector<uint32_t> mask(size_t(mask_words(vocab_)), 0);
    mask[generated.size() / 32] |= 1u << (generated.size() % 32);
    changes->allow_only(mask);
  }

 private:
  const int waiting_, vocab_;
};

}  // namespace

void bind_testing_scheduler(py::module_& m) {
  m.attr("SHORT_PROMPT") = kShortPrompt;
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init([](int slots, int rows, int prefill_rows, int max_len, int pages, const std::string& reuse, int short_prompt) {
        const std::map<std::string, Reuse> kinds{{"none", Reuse::none}, {"same rows", Reuse::same_rows}, {"any rows", Reuse::any_rows}};
        return std::make_unique<Scheduler>(Limits{slots, rows, max_len, pages}, prefill_rows, kinds.at(reuse), short_prompt);
      }), py::kw_only(), py::arg("slots"), py::arg("rows"), py::arg("prefill_rows"), py::arg("max_len"), py::arg("pages"), py::arg("reuse"),
           py::arg("short_prompt") = 0)
      .def("add", [](Scheduler& s, int64_t uid, std::vector<int32_t> prompt, int max_tokens, const std::string& salt, int waiting, int64_t ahead_of) {
        RuleList rules;
        if (waiting >= 0) rules.push_back(std::make_unique<ScriptedRule>(waiting, 64));
        s.add(uid, std::move(prompt), max_tokens, {}, std::move(rules), salt, ahead_of);
      }, py::arg("uid"), py::arg("prompt"), py::arg("max_tokens"), py::arg("salt") = "", py::arg("waiting") = -1, py::arg("ahead_of") = 0)
      .def("accept", &Scheduler::accept)
      .def("remove", &Scheduler::remove)
      .def("schedule", [](Scheduler& s) -> py::object {
        Batch b;
        Step step;
        if (!s.schedule(&b, &step)) return py::none();
        py::list chunks;
        for (const Chunk& c : b.chunks) chunks.append(py::make_tuple(c.row, c.count, c.slot, c.position));
        py::dict d;
        d["decode_rows"] = b.decode_rows;
        d["token"] = b.token;
        d["slot"] = b.slot;
        d["position"] = b.position;
        d["chunks"] = chunks;
        d["logit_row"] = b.logit_row;
        py::list edits;
        for (const LogitEdit& e : b.edits) edits.append(py::make_tuple(e.token, e.add, e.penalty));
        d["edit_begin"] = b.edit_begin;
        d["edits"] = edits;
        d["mask_of"] = b.mask_of;
        d["masks"] = b.masks;
        d["table_slot"] = b.table_slot;
        d["table"] = b.table;
        d["sampled"] = step.sampled;
        py::list admitted, copies;
        for (const Admission& a : step.admitted) admitted.append(py::make_tuple(a.uid, a.cached));
        for (const PageCopy& c : b.copies) copies.append(py::make_tuple(c.from, c.to, c.tokens));
        d["admitted"] = admitted;
        d["copies"] = copies;
        return d;
      })
      .def_property_readonly("needs_results", &Scheduler::needs_results)
      .def_property_readonly("running", &Scheduler::running)
      .def_property_readonly("waiting", &Scheduler::waiting)
      .def_property_readonly("free_pages", &Scheduler::free_pages)
      .def_property_readonly("cached_pages", &Scheduler::cached_pages)
      .def_property_readonly("evictions", &Scheduler::evictions)
      .def_property_readonly("preemptions", &Scheduler::preemptions);

  py::class_<KvPages>(m, "KvPages")
      .def(py::init<int>())
      .def("take", &KvPages::take)
      .def("share", &KvPages::share)
      .def("release", &KvPages::release)
      .def("keep", &KvPages::keep)
      .def("drop", &KvPages::drop)
      .def("references", &KvPages::references)
      .def_property_readonly("free", &KvPages::free)
      .def_property_readonly("idle", &KvPages::idle);

  // One sequence's pages of one tree, as the scheduler would hold them.
  struct Tree {
    KvPages pages;
    PrefixCache cache{&pages};
    explicit Tree(int n) : pages(n) {}
  };
  py::class_<Tree>(m, "PrefixCache")
      .def(py::init<int>(), py::arg("pages"))
      // A sequence that computes keys and ends; the pages that it used. Nothing is taken over.
      .def("put", [](Tree& t, const std::vector<int32_t>& keys, const std::string& salt) {
        std::vector<int32_t> pages;
        for (size_t i = 0; i < keys.size(); i += kPageTokens) {
          if (t.pages.free() == 0 && !t.cache.evict()) throw std::runtime_error("no page");
          pages.push_back(t.pages.take());
        }
        const std::vector<int32_t> used = pages;
        t.cache.touch(t.cache.insert(salt, nullptr, keys, &pages));
        for (int32_t page : pages) t.pages.release(page);
        return used;
      }, py::arg("keys"), py::arg("salt") = "")
      // (tokens, full pages, page to copy from or -1) of the longest match, held until it is released.
      .def("find", [](Tree& t, const std::vector<int32_t>& keys, const std::string& salt) {
        const PrefixCache::Match match = t.cache.find(salt, keys);
        return py::make_tuple(match.tokens, match.pages, match.partial);
      }, py::arg("keys"), py::arg("salt") = "")
      .def("release", [](Tree& t, int32_t page) { t.pages.release(page); })
      .def("evict", [](Tree& t) { return t.cache.evict(); })
      .def_property_readonly("nodes", [](const Tree& t) { return t.cache.nodes(); })
      .def_property_readonly("free", [](const Tree& t) { return t.pages.free(); })
      .def_property_readonly("idle", [](const Tree& t) { return t.pages.idle(); });
}
