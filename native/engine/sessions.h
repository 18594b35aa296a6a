// Which requests a newer one of the same session makes stale. Requests are ranges of uids: one for each text that they give.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace codefuse {

// A key names a session; requests with the empty key have none. Not thread-safe.
class Sessions {
 public:
  // uids that a new request would make stale; beside: as in join().
  size_t before(const std::string& key, int64_t beside) const;
  // Adds uids uid .. uid + texts - 1 and returns those that are stale from now on, in order: all before them, or they themselves when they came
  // together with a request (beside: its uid, 0: with none) that a newer one has made stale.
  std::vector<int64_t> join(const std::string& key, int64_t uid, int texts, int64_t beside);
  // The request has ended.
  void leave(const std::string& key, int64_t uid, int texts);
  size_t stale() const { return stale_.size(); }  // uids that are, and have not ended

 private:
  struct Session {
    int64_t first = 0;          // uid of the first request of those that came together
    std::vector<int64_t> uids;  // of those of them that have not ended, at least one
  };
  std::unordered_map<std::string, Session> sessions_;
  std::unordered_set<int64_t> stale_;
};

}  // namespace codefuse
