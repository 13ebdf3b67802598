// SPDX-License-Identifier: Apache-2.0
#include "device_events.hpp"

#include <fcntl.h>

#include <cerrno>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

std::optional<DeviceTrouble> trouble_of(ibv_event_type type) {
  using Scope = DeviceTrouble::Scope;
  const auto gone = std::make_error_code(std::errc::network_down);
  switch (type) {
    case IBV_EVENT_DEVICE_FATAL: return DeviceTrouble{Scope::device, gone, "the device failed or was removed"};
    case IBV_EVENT_PORT_ERR: return DeviceTrouble{Scope::port, gone, "the port's link went down"};
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
      return DeviceTrouble{Scope::queue_pair, errc::connection_lost, ibv_event_type_str(type)};
    case IBV_EVENT_CQ_ERR:
      return DeviceTrouble{Scope::completion_queue, errc::connection_lost, ibv_event_type_str(type)};
    default: return std::nullopt;
  }
}

DeviceEvents::DeviceEvents(const asio::any_io_executor& executor, std::shared_ptr<RailDevice> device)
    : device_(std::move(device)), descriptor_(executor) {}

DeviceEvents::~DeviceEvents() { close(); }

void DeviceEvents::start() {
  const int descriptor = device_->context()->async_fd;
  const int flags = ::fcntl(descriptor, F_GETFL);
  std::error_code ec;
  if (flags < 0 || ::fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) != 0) {
    ec = last_verbs_error();
  }
  const std::lock_guard lock(mutex_);
  if (!ec) {
    descriptor_.assign(descriptor, ec);
  }
  if (ec) {
    throw TransferError(ec, "RDMA device '" + device_->name() + "': its events can't be awaited: " + ec.message());
  }
  wait();
}

void DeviceEvents::close() {
  const std::lock_guard lock(mutex_);
  if (descriptor_.is_open()) {
    descriptor_.release();  // it is the device's
  }
  entries_.clear();
}

void DeviceEvents::add(std::weak_ptr<Listener> listener, const ibv_qp* pair, const ibv_cq* completions) {
  const std::lock_guard lock(mutex_);
  std::erase_if(entries_, [](const Entry& entry) { return entry.listener.expired(); });
  entries_.push_back({std::move(listener), pair, completions});
}

void DeviceEvents::wait() {
  descriptor_.async_wait(asio::posix::stream_descriptor::wait_read, [weak = weak_from_this()](std::error_code ec) {
    const auto self = weak.lock();
    if (self && !ec) {
      self->read();
    }
  });
}

void DeviceEvents::read() {
  for (;;) {
    ibv_async_event event{};
    {
      const std::lock_guard lock(mutex_);
      if (!descriptor_.is_open()) {
        return;
      }
      if (ibv_get_async_event(device_->context(), &event) != 0) {
        if (errno == EAGAIN || errno == EINTR) {
          wait();
          return;
        }
        break;
      }
    }
    tell(event);
  }
  // It was taken away from under the program.
  tell_all(*trouble_of(IBV_EVENT_DEVICE_FATAL));
}

void DeviceEvents::tell(const ibv_async_event& event) {
  const auto trouble = trouble_of(event.event_type);
  const bool other_port = trouble && trouble->scope == DeviceTrouble::Scope::port &&
                          event.element.port_num != static_cast<int>(device_->port());
  std::vector<std::weak_ptr<Listener>> told;
  const bool tells_all =
      trouble && !other_port &&
      (trouble->scope == DeviceTrouble::Scope::device || trouble->scope == DeviceTrouble::Scope::port);
  if (trouble && !other_port && !tells_all) {
    const std::lock_guard lock(mutex_);
    for (const Entry& entry : entries_) {
      if (trouble->scope == DeviceTrouble::Scope::queue_pair ? entry.pair == event.element.qp
                                                             : entry.completions == event.element.cq) {
        told.push_back(entry.listener);
      }
    }
  }
  // Before anybody is told: a queue pair can't be destroyed while an event of it is out.
  ibv_async_event acknowledged = event;
  ibv_ack_async_event(&acknowledged);
  if (tells_all) {
    tell_all(*trouble);
  }
  for (const auto& weak : told) {
    if (const auto listener = weak.lock()) {
      listener->device_failed(trouble->cause, trouble->what);
    }
  }
}

void DeviceEvents::tell_all(const DeviceTrouble& trouble) {
  std::vector<Entry> entries;
  {
    const std::lock_guard lock(mutex_);
    entries = entries_;
  }
  for (const Entry& entry : entries) {
    if (const auto listener = entry.listener.lock()) {
      listener->device_failed(trouble.cause, trouble.what);
    }
  }
}

}  // namespace kvferry::rdma
