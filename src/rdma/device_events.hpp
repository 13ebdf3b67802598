// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/posix/stream_descriptor.hpp>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "rail_device.hpp"
#include "verbs.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// The part of a device that has become unusable, by its own events.
struct DeviceTrouble {
  enum class Scope : std::uint8_t { device, port, queue_pair, completion_queue };
  Scope scope = Scope::device;
  std::error_code cause;
  std::string what;
};

/// @return nothing for events that break no connection.
[[nodiscard]] std::optional<DeviceTrouble> trouble_of(ibv_event_type type);

/// Reads a device's events, and tells the owners of the connections that break by them. It tells them at once:
/// otherwise the adapter would retry for seconds, and an idle connection would notice nothing.
class DeviceEvents : public std::enable_shared_from_this<DeviceEvents> {
 public:
  class Listener {
   public:
    virtual ~Listener() = default;
    /// Called on a thread of the executor, or on the one that began to listen.
    virtual void device_failed(std::error_code cause, const std::string& why) = 0;
  };

  DeviceEvents(const asio::any_io_executor& executor, std::shared_ptr<RailDevice> device);
  DeviceEvents(const DeviceEvents&) = delete;
  DeviceEvents& operator=(const DeviceEvents&) = delete;
  ~DeviceEvents();

  /// Begins to read. @throws TransferError if the descriptor can't be awaited.
  void start();
  /// Stops telling.
  void close();

  /// Subscribes a rail for as long as it lives. @param pair, @param completions identify the rail's own events.
  void add(std::weak_ptr<Listener> listener, const ibv_qp* pair, const ibv_cq* completions);

 private:
  struct Entry {
    std::weak_ptr<Listener> listener;
    const ibv_qp* pair;
    const ibv_cq* completions;
  };

  void wait();
  void read();
  void tell(const ibv_async_event& event);
  void tell_all(const DeviceTrouble& trouble);

  const std::shared_ptr<RailDevice> device_;
  std::mutex mutex_;  ///< Guards all below.
  asio::posix::stream_descriptor descriptor_;
  std::vector<Entry> entries_;
};

}  // namespace kvferry::rdma
