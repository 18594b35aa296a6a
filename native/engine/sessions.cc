#include "engine/sessions.h"

#include <algorithm>

namespace codefuse {

size_t Sessions::before(const std::string& key, int64_t beside) const {
  const auto it = sessions_.find(key);
  return it == sessions_.end() || beside > 0 ? 0 : it->second.uids.size();
}

std::vector<int64_t> Sessions::join(const std::string& key, int64_t uid, int texts, int64_t beside) {
  std::vector<int64_t> stale;
  if (key.empty()) return stale;
  Session& session = sessions_[key];
  const int64_t first = beside > 0 ? beside : uid;
  if (session.first < first) {
    stale.swap(session.uids);
    session.first = first;
  }
  std::vector<int64_t>& uids = session.first == first ? session.uids : stale;
  for (int i = 0; i < texts; ++i) uids.push_back(uid + i);
  stale_.insert(stale.begin(), stale.end());
  return stale;
}

void Sessions::leave(const std::string& key, int64_t uid, int texts) {
  for (int i = 0; i < texts; ++i) stale_.erase(uid + i);
  const auto it = sessions_.find(key);
  if (it == sessions_.end()) return;
  std::vector<int64_t>& uids = it->second.uids;
  uids.erase(std::remove_if(uids.begin(), uids.end(), [&](int64_t u) { return u >= uid && u < uid + texts; }), uids.end());
  if (uids.empty()) sessions_.erase(it);
}

}  // namespace codefuse
