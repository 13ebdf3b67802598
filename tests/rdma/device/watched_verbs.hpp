// SPDX-License-Identifier: Apache-2.0
#pragma once

// This program's own definitions of some verbs stand between the library and the adapter (watched_verbs.cpp).
#include <infiniband/verbs.h>

#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace watched_verbs {

/// Sees the requests of all queue pairs of this process, while a test has one.
class Watcher {
 public:
  Watcher() = default;
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;
  virtual ~Watcher() = default;
  virtual int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad);
  virtual int post_recv(ibv_qp* pair, ibv_recv_wr* list, ibv_recv_wr** bad);
};

extern std::atomic<Watcher*> watcher;

/// Devices whose ports have no address at the moment.
struct Unaddressed {
  std::mutex mutex;
  std::vector<std::string> devices;
};

Unaddressed& unaddressed();

/// The completion queues that were made last.
struct MadeQueues {
  struct Queue {
    const ibv_context* context = nullptr;
    int interrupt = 0;
  };
  std::mutex mutex;
  std::vector<Queue> queues;
};

MadeQueues& made_queues();

/// Has a watcher see everything as long as it lives. Channels are made later, and closed before.
template <class Kind>
class Watching {
 public:
  Watching() { watcher = &own_; }
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;
  ~Watching() { watcher = nullptr; }
  Kind* operator->() { return &own_; }

 private:
  Kind own_;
};

/// Has devices lose their addresses, until the test ends.
class Addresses {
 public:
  Addresses() = default;
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  ~Addresses() { lose({}); }
  void lose(std::vector<std::string> devices) {
    const std::lock_guard lock(unaddressed().mutex);
    unaddressed().devices = std::move(devices);
  }
};

}  // namespace watched_verbs
