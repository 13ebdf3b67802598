// SPDX-License-Identifier: Apache-2.0
// UCX between two processes of one host, over its transports for that: posix (shared memory) and cma (process_vm).
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <stdexcept>
#include <stop_token>
#include <system_error>
#include <vector>

#include "common/serving_thread.hpp"
#include "ucx_worker.hpp"

namespace bench {

inline constexpr const char* transports_of_one_host = "posix,cma";

/// A memory that another process of the host writes and reads.
class UcxTarget {
 public:
  /// @param memory without an address: UCX allocates as much.
  /// @param busy in memory of both processes. While it is set the worker is polled, else it sleeps.
  /// @param line a socket of records, whose other end has the initiator: it is told where the memory is.
  UcxTarget(std::span<std::byte> memory, const std::atomic<bool>& busy, int line)
      : busy_(busy), worker_(memory, true, transports_of_one_host) {
    std::byte* const begin = worker_.memory();
    std::vector<std::uint8_t> where(sizeof(begin));
    std::memcpy(where.data(), &begin, sizeof(begin));
    for (const auto& record : {worker_.address(), worker_.key(), where}) {
      if (::send(line, record.data(), record.size(), MSG_NOSIGNAL) < 0) {
        throw std::system_error(errno, std::system_category(), "send");
      }
    }
    serving_.start([this](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        worker_.progress(busy_);
      }
    });
  }

 private:
  const std::atomic<bool>& busy_;
  const Worker worker_;
  ServingThread serving_;
};

/// Writes and reads the memory of an `UcxTarget`.
class UcxInitiator {
 public:
  /// @param memory of this process, that pages are moved to and from.
  UcxInitiator(std::span<std::byte> memory, int line, std::atomic<bool>& busy)
      : busy_(busy), memory_(memory), worker_(memory, false, transports_of_one_host) {
    const auto address = record(line);
    const auto key = record(line);
    const auto begin = record(line);
    std::memcpy(&target_, begin.data(), sizeof(target_));
    busy_ = true;
    remote_.emplace(worker_, address, key);
    busy_ = false;
  }

  /// Moves pages, and returns when all have been moved. The target polls from now on.
  void move(bool write, std::size_t page, std::span<const std::uint64_t> here, std::span<const std::uint64_t> there) {
    busy_ = true;
    requests_.clear();
    for (std::size_t i = 0; i < here.size(); ++i) {
      const auto local = memory_.subspan(here[i] * page, page);
      const std::uint64_t remote = target_ + there[i] * page;
      const auto request = write ? remote_->put(local, remote) : remote_->get(local, remote);
      if (request != nullptr) {
        requests_.push_back(request);
      }
    }
    for (const auto request : requests_) {
      worker_.wait(request, "a put or get");
    }
    remote_->flush();
  }

 private:
  [[nodiscard]] static std::vector<std::uint8_t> record(int line) {
    std::vector<std::uint8_t> bytes(std::size_t{64} << 10);
    const auto size = ::recv(line, bytes.data(), bytes.size(), 0);
    if (size <= 0) {
      throw std::runtime_error("the other process did not tell where its memory is");
    }
    bytes.resize(static_cast<std::size_t>(size));
    return bytes;
  }

  std::atomic<bool>& busy_;
  const std::span<std::byte> memory_;
  const Worker worker_;
  std::uintptr_t target_ = 0;
  std::optional<RemoteWorker> remote_;
  std::vector<ucs_status_ptr_t> requests_;
};

}  // namespace bench
