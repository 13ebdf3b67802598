// SPDX-License-Identifier: Apache-2.0
#include "ring.hpp"

#include <sys/socket.h>

#include <stdexcept>
#include <system_error>

#include "common/region.hpp"

#ifdef KVFERRY_BENCH_WITH_URING

#include <liburing.h>

#include <algorithm>

namespace bench {
namespace {

constexpr unsigned entries = 128;
// As much as the kernel takes as one registered buffer.
constexpr std::size_t registered_at_most = std::size_t{1} << 30U;

void check(int result, const char* what) {
  if (result < 0) {
    throw std::system_error(-result, std::system_category(), what);
  }
}

}  // namespace

Ring::Ring(int socket, const Region& region, bool zero_copy)
    : socket_(socket), zero_copy_(zero_copy), ring_(std::make_unique<io_uring>()) {
  if (zero_copy && region.size() > registered_at_most) {
    throw std::invalid_argument("a region to send from without a copy has at most 1 GiB");
  }
  io_uring_params params{};
  // A send without a copy has two completions, and a chain many sends.
  params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE;
  params.cq_entries = 8 * entries;
  check(io_uring_queue_init_params(entries, ring_.get(), &params), "io_uring_setup");
  if (zero_copy) {
    const iovec whole{region.data(), region.size()};
    if (const int result = io_uring_register_buffers(ring_.get(), &whole, 1); result < 0) {
      io_uring_queue_exit(ring_.get());
      check(result, "io_uring_register of the region");
    }
  }
}

Ring::~Ring() { io_uring_queue_exit(ring_.get()); }

std::size_t Ring::send(std::span<iovec> pieces) { return zero_copy_ ? send_registered(pieces) : send_message(pieces); }

std::size_t Ring::send_message(std::span<iovec> pieces) {
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = pieces.size();
  io_uring_prep_sendmsg(io_uring_get_sqe(ring_.get()), socket_, &message, MSG_NOSIGNAL | MSG_WAITALL);
  return complete(1);
}

std::size_t Ring::send_registered(std::span<iovec> pieces) {
  const auto some = pieces.first(std::min<std::size_t>(pieces.size(), entries));
  for (const auto& piece : some) {
    io_uring_sqe* const sqe = io_uring_get_sqe(ring_.get());
    io_uring_prep_send_zc(sqe, socket_, piece.iov_base, piece.iov_len, MSG_NOSIGNAL | MSG_WAITALL,
                          IORING_RECVSEND_FIXED_BUF);
    sqe->buf_index = 0;
    if (&piece != &some.back()) {
      sqe->flags |= IOSQE_IO_LINK;  // one after the other, and none after one that sent less than it should
    }
  }
  return complete(static_cast<unsigned>(some.size()));
}

std::size_t Ring::receive(std::span<iovec> pieces) {
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = pieces.size();
  io_uring_prep_recvmsg(io_uring_get_sqe(ring_.get()), socket_, &message, 0);
  return complete(1);
}

// That the kernel has let go of a sent page isn't waited for: the other side has all of a batch before it says so.
std::size_t Ring::complete(unsigned operations) {
  check(io_uring_submit_and_wait(ring_.get(), operations), "io_uring_enter");
  std::size_t bytes = 0;
  while (operations > 0) {
    io_uring_cqe* completion = nullptr;
    check(io_uring_wait_cqe(ring_.get(), &completion), "io_uring_wait_cqe");
    const int result = completion->res;
    const bool notification = (completion->flags & IORING_CQE_F_NOTIF) != 0;
    io_uring_cqe_seen(ring_.get(), completion);
    if (notification) {
      continue;
    }
    --operations;
    if (result != -ECANCELED) {
      check(result, "io_uring");
      bytes += static_cast<std::size_t>(result);
    }
  }
  return bytes;
}

bool has_ring() { return true; }

}  // namespace bench

#else

struct io_uring {};

namespace bench {

Ring::Ring(int socket, const Region& /*region*/, bool zero_copy) : socket_(socket), zero_copy_(zero_copy) {
  throw std::logic_error("built without liburing");
}
Ring::~Ring() = default;
std::size_t Ring::send(std::span<iovec> /*pieces*/) { return 0; }
std::size_t Ring::receive(std::span<iovec> /*pieces*/) { return 0; }

bool has_ring() { return false; }

}  // namespace bench

#endif
