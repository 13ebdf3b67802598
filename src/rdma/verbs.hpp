// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <infiniband/verbs.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

template <class Object, int (*destroy)(Object*)>
struct VerbsDeleter {
  void operator()(Object* object) const noexcept { (void)destroy(object); }
};

// Destroy each before the objects from which it was made: queue pair, completion queue, channel; memory region, domain;
// context.
using ContextPtr = std::unique_ptr<ibv_context, VerbsDeleter<ibv_context, ibv_close_device>>;
using DomainPtr = std::unique_ptr<ibv_pd, VerbsDeleter<ibv_pd, ibv_dealloc_pd>>;
using MemoryRegionPtr = std::unique_ptr<ibv_mr, VerbsDeleter<ibv_mr, ibv_dereg_mr>>;
using CompletionChannelPtr =
    std::unique_ptr<ibv_comp_channel, VerbsDeleter<ibv_comp_channel, ibv_destroy_comp_channel>>;
using CompletionQueuePtr = std::unique_ptr<ibv_cq, VerbsDeleter<ibv_cq, ibv_destroy_cq>>;
using QueuePairPtr = std::unique_ptr<ibv_qp, VerbsDeleter<ibv_qp, ibv_destroy_qp>>;

/// The functions, not the macro, whose expansion converts between int and unsigned. Rights that an old kernel doesn't know, and may
/// do without (relaxed ordering), are left out by the second one.
[[nodiscard]] inline MemoryRegionPtr register_memory(ibv_pd* domain, void* address, std::size_t size, int access) {
  const auto rights = static_cast<unsigned>(access);
  return MemoryRegionPtr(
      (rights & IBV_ACCESS_OPTIONAL_RANGE) == 0
          ? (ibv_reg_mr)(domain, address, size, access)
          : ibv_reg_mr_iova2(domain, address, size, reinterpret_cast<std::uintptr_t>(address), rights));
}

/// The error of a verb that returns a pointer, from errno.
[[nodiscard]] inline std::error_code last_verbs_error() noexcept {
  return {errno == 0 ? EIO : errno, std::system_category()};
}

/// The error of a verb that returns an int: an errno value, or -1 with errno set.
[[nodiscard]] inline std::error_code verbs_error(int result) noexcept {
  return result > 0 ? std::error_code(result, std::system_category()) : last_verbs_error();
}

}  // namespace kvferry::rdma
