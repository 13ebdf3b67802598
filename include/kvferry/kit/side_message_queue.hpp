// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_SIDE_MESSAGE_QUEUE_HPP
#define KVFERRY_KIT_SIDE_MESSAGE_QUEUE_HPP

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Messages that wait for the channel's user, or for the channel to be ready: limited in bytes by source and in all.
/// They are taken from the sources in turn, so a source with many messages doesn't delay others. Thread-safe.
class SideMessageQueue {
 public:
  struct Bounds {
    std::size_t bytes = 0;
    std::size_t bytes_of_source = 0;
  };

  explicit SideMessageQueue(const Bounds& bounds) : bounds_(bounds) {}
  SideMessageQueue(const SideMessageQueue&) = delete;
  SideMessageQueue& operator=(const SideMessageQueue&) = delete;

  /// @param answer handles the message. @param bytes of the message.
  /// @return false if there is no room; then `answer` is as it was.
  [[nodiscard]] bool push(const std::string& source, std::size_t bytes, std::function<void()>& answer);

  /// The next message; empty if there is none.
  [[nodiscard]] std::function<void()> pop();

  /// The bytes that a message counts for beyond its own.
  static constexpr std::size_t overhead = 512;

 private:
  struct Entry {
    std::size_t cost = 0;
    std::function<void()> answer;
  };
  struct Source {
    std::size_t cost = 0;
    std::deque<Entry> entries;
  };

  const Bounds bounds_;
  std::mutex mutex_;
  std::map<std::string, Source> sources_;  ///< Those that have entries.
  std::string last_;                       ///< Whose turn it was.
  std::size_t cost_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_SIDE_MESSAGE_QUEUE_HPP
