// SPDX-License-Identifier: Apache-2.0
#include "rdma/device/watched_verbs.hpp"

#include <dlfcn.h>
#include <infiniband/verbs.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace watched_verbs {
namespace {

/// The adapter's own functions.
struct Adapter {
  std::atomic<decltype(ibv_context_ops::post_send)> post_send{nullptr};
  std::atomic<decltype(ibv_context_ops::post_recv)> post_recv{nullptr};
};

Adapter& adapter() {
  static Adapter own;
  return own;
}

int watched_post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) {
  Watcher* const present = watcher;
  return present != nullptr ? present->post_send(pair, list, bad) : adapter().post_send.load()(pair, list, bad);
}

int watched_post_recv(ibv_qp* pair, ibv_recv_wr* list, ibv_recv_wr** bad) {
  Watcher* const present = watcher;
  return present != nullptr ? present->post_recv(pair, list, bad) : adapter().post_recv.load()(pair, list, bad);
}

}  // namespace

std::atomic<Watcher*> watcher{nullptr};

int Watcher::post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) {
  return adapter().post_send.load()(pair, list, bad);
}

int Watcher::post_recv(ibv_qp* pair, ibv_recv_wr* list, ibv_recv_wr** bad) {
  return adapter().post_recv.load()(pair, list, bad);
}

Unaddressed& unaddressed() {
  static Unaddressed present;
  return present;
}

MadeQueues& made_queues() {
  static MadeQueues made;
  return made;
}

extern "C" {

ibv_cq* ibv_create_cq(ibv_context* context, int size, void* own, ibv_comp_channel* channel, int vector) {
  static std::mutex mutex;
  static const auto of_library = reinterpret_cast<decltype(&ibv_create_cq)>(::dlsym(RTLD_NEXT, "ibv_create_cq"));
  ibv_cq* const queue = of_library(context, size, own, channel, vector);
  {
    const std::lock_guard made_lock(made_queues().mutex);
    made_queues().queues.push_back({context, vector});
  }
  const std::lock_guard lock(mutex);
  // Another part of this program may put itself before these later, so it is the second one that tells a context that is known.
  if (queue != nullptr && context->ops.post_recv != &watched_post_recv) {
    adapter().post_send = context->ops.post_send;
    adapter().post_recv = context->ops.post_recv;
    context->ops.post_send = &watched_post_send;
    context->ops.post_recv = &watched_post_recv;
  }
  return queue;
}

ssize_t _ibv_query_gid_table(ibv_context* context, ibv_gid_entry* entries, std::size_t size, std::uint32_t flags,
                             std::size_t entry_size) {
  {
    const std::lock_guard lock(unaddressed().mutex);
    if (std::ranges::find(unaddressed().devices, ibv_get_device_name(context->device)) != unaddressed().devices.end()) {
      return 0;
    }
  }
  static const auto of_library =
      reinterpret_cast<decltype(&_ibv_query_gid_table)>(::dlsym(RTLD_NEXT, "_ibv_query_gid_table"));
  return of_library(context, entries, size, flags, entry_size);
}
}

}  // namespace watched_verbs
