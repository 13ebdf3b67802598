// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/standard_descriptors.hpp>

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace kvferry::inline KVFERRY_ABI {

KVFERRY_INLINE void occupy_standard_descriptors() noexcept {
  for (int standard = STDIN_FILENO; standard <= STDERR_FILENO; ++standard) {
    if (::fcntl(standard, F_GETFD) == -1 && errno == EBADF) {
      // Programs that this one starts are to have it, too.
      const int opened = ::open("/dev/null", O_RDWR);  // NOLINT: not close-on-exec on purpose
      if (opened > STDERR_FILENO) {
        ::close(opened);  // another thread was faster
      }
    }
  }
}

}  // namespace kvferry
