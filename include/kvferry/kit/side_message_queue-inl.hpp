// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/side_message_queue.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE bool SideMessageQueue::push(const std::string& source, std::size_t bytes,
                                           std::function<void()>& answer) {
  const std::size_t cost = bytes + overhead;
  const std::lock_guard lock(mutex_);
  const auto known = sources_.find(source);
  const std::size_t of_source = known == sources_.end() ? 0 : known->second.cost;
  if (cost > bounds_.bytes - cost_ || of_source > bounds_.bytes_of_source ||
      cost > bounds_.bytes_of_source - of_source) {
    return false;
  }
  Source& to = sources_[source];
  to.entries.push_back({cost, std::move(answer)});
  to.cost += cost;
  cost_ += cost;
  return true;
}

KVFERRY_INLINE std::function<void()> SideMessageQueue::pop() {
  const std::lock_guard lock(mutex_);
  if (sources_.empty()) {
    return {};
  }
  auto next = sources_.upper_bound(last_);
  if (next == sources_.end()) {
    next = sources_.begin();
  }
  last_ = next->first;
  Source& from = next->second;
  Entry entry = std::move(from.entries.front());
  from.entries.pop_front();
  from.cost -= entry.cost;
  cost_ -= entry.cost;
  if (from.entries.empty()) {
    sources_.erase(next);
  }
  return std::move(entry.answer);
}

}  // namespace kvferry::kit
