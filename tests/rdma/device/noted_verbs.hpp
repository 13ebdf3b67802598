// SPDX-License-Identifier: Apache-2.0
#pragma once

// Verbs as the program calls them: noted, held up, or made to fail when a test says so (noted_verbs.cpp).
#include <infiniband/verbs.h>

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "rdma/message.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

struct VerbsLog {
  enum class Verb { destroy_queue_pair, do_register, deregister };
  struct Call {
    Verb verb;
    const void* what;  ///< The queue pair; the memory.
    const ibv_context* context;
    std::string thread = {};  ///< The name of the one that calls it. Not of destroy_queue_pair.
    unsigned access = 0;      ///< do_register: the rights.
  };

  void add(const Call& call) {
    const std::lock_guard lock(mutex);
    calls.push_back(call);
  }
  void clear() {
    const std::lock_guard lock(mutex);
    calls.clear();
  }

  std::mutex mutex;
  std::vector<Call> calls;
};

VerbsLog& verbs_log();

/// Something to be done when this memory is registered, or deregistered, next.
struct BeforeCall {
  void set(const void* memory, std::function<void()> what) {
    const std::lock_guard lock(mutex);
    at = memory;
    call = std::move(what);
  }
  void called(const void* memory) {
    std::function<void()> what;
    {
      const std::lock_guard lock(mutex);
      if (memory == at) {
        what = std::exchange(call, nullptr);
      }
    }
    if (what) {
      what();
    }
  }

  std::mutex mutex;
  const void* at = nullptr;
  std::function<void()> call;
};

/// How many more queue pairs the device makes; any number if negative.
extern std::atomic<int> room_for_queue_pairs;

BeforeCall& before_registering();
BeforeCall& before_deregistering();

/// A file that stands for a dma-buf, which an adapter without such registers as the memory that it is mapped at.
extern std::atomic<ino_t> dmabuf_file;
extern std::atomic<int> registered_dmabuf;  ///< By this descriptor, the last time.

[[nodiscard]] bool is_dmabuf_file(int descriptor);

/// Where memory begins that can't be registered any more, once it has been so many times.
extern std::atomic<const void*> registering_fails_at;
extern std::atomic<int> registrations_left;

/// While it is so no memory can be registered, as it may not be pinned.
extern std::atomic<bool> registering_fails;
extern std::atomic<int> registrations_refused;  ///< So far, for this reason.

extern std::atomic<bool> next_long_post_fails;
extern std::atomic<const ibv_qp*> pair_of_failed_post;

/// Messages of this type that end something of several messages never go out; 0: all do.
extern std::atomic<MessageType> last_parts_withheld;

/// An address at which nobody answers: to resolve it takes until the test says so, as it takes the kernel a second.
class AbsentPeer {
 public:
  static constexpr std::uint8_t last_byte = 199;

  /// @return whether the peer's address is this one; then it took its time.
  bool resolve(const ibv_ah_attr& way) {
    if (way.grh.dgid.raw[15] != last_byte) {
      return false;
    }
    std::unique_lock lock(mutex_);
    ++resolving_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return given_up_; });
    return true;
  }

  [[nodiscard]] bool wait_until_resolving(int count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(60), [&] { return resolving_ == count; });
  }

  void give_up() {
    const std::lock_guard lock(mutex_);
    given_up_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int resolving_ = 0;
  bool given_up_ = false;
};

AbsentPeer& absent_peer();

inline NodeOptions isolating(std::size_t rails = 1) {
  NodeOptions options{.rails = rails};
  options.channel.isolate_peers = true;
  return options;
}

}  // namespace kvferry::rdma::testing
