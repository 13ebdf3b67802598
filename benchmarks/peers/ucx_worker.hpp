// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/core.h>
#include <poll.h>
#include <ucp/api/ucp.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace bench {

inline void check(ucs_status_t status, const char* what) {
  if (status != UCS_OK) {
    throw std::runtime_error(fmt::format("{}: {}", what, ucs_status_string(status)));
  }
}

/// A worker that speaks tcp only, or what else it is told, and a region that it knows: what both sides of a transfer have.
class Worker {
 public:
  /// @param region without an address: UCX allocates as much, where other processes of the host can map it.
  Worker(std::span<std::byte> region, bool sleeps, const char* transports = "tcp") : sleeps_(sleeps) {
    ucp_config_t* config = nullptr;
    check(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
    check(ucp_config_modify(config, "TLS", transports), "UCX_TLS");
    ucp_params_t parameters{};
    parameters.field_mask = UCP_PARAM_FIELD_FEATURES;
    parameters.features = UCP_FEATURE_RMA;
    if (sleeps) {
      parameters.features |= UCP_FEATURE_WAKEUP;
    }
    const auto status = ucp_init(&parameters, config, &context_);
    ucp_config_release(config);
    check(status, "ucp_init");
    ucp_worker_params_t worker{};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SINGLE;
    check(ucp_worker_create(context_, &worker, &worker_), "ucp_worker_create");
    ucp_mem_map_params_t memory{};
    memory.field_mask =
        UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS;
    memory.address = region.data();
    memory.length = region.size();
    memory.flags = region.data() == nullptr ? unsigned{UCP_MEM_MAP_ALLOCATE} : 0U;
    check(ucp_mem_map(context_, &memory, &memory_), "ucp_mem_map");
    ucp_mem_attr_t mapped{};
    mapped.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
    check(ucp_mem_query(memory_, &mapped), "ucp_mem_query");
    memory_at_ = static_cast<std::byte*>(mapped.address);
    if (sleeps) {
      check(ucp_worker_get_efd(worker_, &descriptor_), "ucp_worker_get_efd");
    }
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    ucp_mem_unmap(context_, memory_);
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
  }

  [[nodiscard]] ucp_worker_h get() const { return worker_; }
  [[nodiscard]] std::byte* memory() const { return memory_at_; }

  /// For the other side's `RemoteWorker`.
  [[nodiscard]] std::vector<std::uint8_t> address() const {
    ucp_address_t* address = nullptr;
    std::size_t size = 0;
    check(ucp_worker_get_address(worker_, &address, &size), "ucp_worker_get_address");
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(address);
    std::vector<std::uint8_t> result(bytes, bytes + size);
    ucp_worker_release_address(worker_, address);
    return result;
  }
  [[nodiscard]] std::vector<std::uint8_t> key() const {
    void* key = nullptr;
    std::size_t size = 0;
    check(ucp_rkey_pack(context_, memory_, &key, &size), "ucp_rkey_pack");
    const auto* bytes = static_cast<const std::uint8_t*>(key);
    std::vector<std::uint8_t> result(bytes, bytes + size);
    ucp_rkey_buffer_release(key);
    return result;
  }

  /// Does what there is to do; if that is nothing, sleeps until there is something or for a while, if it is one that sleeps.
  void progress(bool busy = false) const {
    if (ucp_worker_progress(worker_) != 0 || !sleeps_ || busy || ucp_worker_arm(worker_) != UCS_OK) {
      return;
    }
    constexpr int milliseconds = 100;  // So that a target notices that it is to end.
    pollfd event{descriptor_, POLLIN, 0};
    ::poll(&event, 1, milliseconds);
  }

  void wait(ucs_status_ptr_t request, const char* what) const {
    if (request == nullptr) {
      return;
    }
    if (UCS_PTR_IS_ERR(request)) {
      check(UCS_PTR_STATUS(request), what);
    }
    ucs_status_t status = UCS_INPROGRESS;
    while ((status = ucp_request_check_status(request)) == UCS_INPROGRESS) {
      progress();
    }
    ucp_request_free(request);
    check(status, what);
  }

 private:
  bool sleeps_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_mem_h memory_ = nullptr;
  std::byte* memory_at_ = nullptr;
  int descriptor_ = -1;
};

/// A worker of the other side, as this side reaches it, and its region.
class RemoteWorker {
 public:
  RemoteWorker(const Worker& worker, const std::vector<std::uint8_t>& address, const std::vector<std::uint8_t>& key)
      : worker_(worker) {
    ucp_ep_params_t parameters{};
    parameters.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
    parameters.address = reinterpret_cast<const ucp_address_t*>(address.data());
    check(ucp_ep_create(worker.get(), &parameters, &endpoint_), "ucp_ep_create");
    check(ucp_ep_rkey_unpack(endpoint_, key.data(), &key_), "ucp_ep_rkey_unpack");
    flush();
  }
  RemoteWorker(const RemoteWorker&) = delete;
  RemoteWorker& operator=(const RemoteWorker&) = delete;
  ~RemoteWorker() {
    ucp_rkey_destroy(key_);
    ucp_request_param_t parameters{};
    const auto request = ucp_ep_close_nbx(endpoint_, &parameters);
    if (UCS_PTR_IS_PTR(request)) {
      while (ucp_request_check_status(request) == UCS_INPROGRESS) {
        worker_.progress();
      }
      ucp_request_free(request);
    }
  }

  /// Starts it. @return a request to wait for, or none if it has ended already.
  [[nodiscard]] ucs_status_ptr_t put(std::span<const std::byte> page, std::uint64_t remote) const {
    ucp_request_param_t parameters{};
    return started(ucp_put_nbx(endpoint_, page.data(), page.size(), remote, key_, &parameters), "ucp_put_nbx");
  }
  [[nodiscard]] ucs_status_ptr_t get(std::span<std::byte> page, std::uint64_t remote) const {
    ucp_request_param_t parameters{};
    return started(ucp_get_nbx(endpoint_, page.data(), page.size(), remote, key_, &parameters), "ucp_get_nbx");
  }

  /// When it returns, all puts before it are done at the other side.
  void flush() const {
    ucp_request_param_t parameters{};
    worker_.wait(ucp_ep_flush_nbx(endpoint_, &parameters), "ucp_ep_flush_nbx");
  }

 private:
  static ucs_status_ptr_t started(ucs_status_ptr_t request, const char* what) {
    if (UCS_PTR_IS_ERR(request)) {
      check(UCS_PTR_STATUS(request), what);
    }
    return request;
  }

  const Worker& worker_;
  ucp_ep_h endpoint_ = nullptr;
  ucp_rkey_h key_ = nullptr;
};

}  // namespace bench
