// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

struct io_uring;

namespace bench {

class Region;

/// System calls of one connection, made through an io_uring of its own: what a transfer library could gain by one. Of one thread.
class Ring {
 public:
  /// @param zero_copy whether the kernel sends out of the region's pages, which are registered, instead of a copy of them.
  /// @throws std::system_error if the kernel has no io_uring, or can't register the region.
  Ring(int socket, const Region& region, bool zero_copy);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring();

  /// Waits until the kernel has taken something. @return bytes
  std::size_t send(std::span<iovec> pieces);
  /// Waits until there is something. @return bytes; 0: the other side has closed
  std::size_t receive(std::span<iovec> pieces);

 private:
  std::size_t send_message(std::span<iovec> pieces);
  std::size_t send_registered(std::span<iovec> pieces);
  std::size_t complete(unsigned operations);

  [[maybe_unused]] int socket_;
  [[maybe_unused]] bool zero_copy_;
  std::unique_ptr<io_uring> ring_;
};

/// Whether this program was built with io_uring.
[[nodiscard]] bool has_ring();

}  // namespace bench
