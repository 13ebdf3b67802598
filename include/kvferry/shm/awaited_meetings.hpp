// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The awaited meetings, each with a listening socket. They are limited in all and by source, since any process that
/// reaches the handshake's port can ask for one. Thread-safe.
class AwaitedMeetings : public std::enable_shared_from_this<AwaitedMeetings> {
 public:
  /// @param most in all; one source may have three quarters of them.
  explicit AwaitedMeetings(std::size_t most) : most_(most), most_of_source_(most - most / 4) {}

  /// A part of the descriptors that the process may have.
  [[nodiscard]] static std::size_t most_of_process() {
    rlimit descriptors{};
    ::getrlimit(RLIMIT_NOFILE, &descriptors);
    return static_cast<std::size_t>(std::clamp<rlim_t>(descriptors.rlim_cur / 8, 16, 4096));
  }

  /// @param source the origin of the handshake. @return a slot; hold it as long as the meeting is awaited.
  /// @throws TransferError `errc::resource_limit`
  [[nodiscard]] std::shared_ptr<void> enter(const std::string& source) {
    const std::lock_guard lock(mutex_);
    std::size_t& own = sources_[source];
    if (own >= most_of_source_ || all_ >= most_) {
      const auto why = std::to_string(own) + " connections are awaited of one address, " + std::to_string(all_) +
                       " in all, of at most " + std::to_string(most_of_source_) + " and " + std::to_string(most_);
      if (own == 0) {
        sources_.erase(source);
      }
      throw TransferError(errc::resource_limit, why);
    }
    auto place = std::make_shared<Place>(shared_from_this(), source);
    ++own;
    ++all_;
    place->taken = true;
    return place;
  }

 private:
  struct Place {
    Place(std::shared_ptr<AwaitedMeetings> its_meetings, std::string its_source)
        : meetings(std::move(its_meetings)), source(std::move(its_source)) {}
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    ~Place() {
      if (taken) {
        meetings->leave(source);
      }
    }

    const std::shared_ptr<AwaitedMeetings> meetings;
    const std::string source;
    bool taken = false;
  };

  void leave(const std::string& source) {
    const std::lock_guard lock(mutex_);
    --all_;
    const auto it = sources_.find(source);
    if (--it->second == 0) {
      sources_.erase(it);
    }
  }

  const std::size_t most_;
  const std::size_t most_of_source_;
  std::mutex mutex_;
  std::size_t all_ = 0;
  std::map<std::string, std::size_t> sources_;
};

}  // namespace kvferry::shm
