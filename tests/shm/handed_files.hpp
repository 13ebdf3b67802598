// SPDX-License-Identifier: Apache-2.0
#pragma once

// The descriptors that may come over a Unix-domain socket beside its bytes.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/shm/mapped_file.hpp>

#include "common/open_descriptors.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {

/// The ends of a connection, which belong to whoever takes them.
inline std::array<int, 2> connected_ends() {
  std::array<int, 2> ends{};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()), 0);
  return ends;
}

/// How many descriptors this process has.
inline std::size_t open_descriptors() { return kvferry_test::open_descriptors().size(); }

/// The files that a peer may hand out.
class HandedFiles : public ::testing::Test {
 protected:
  static constexpr std::size_t size = std::size_t{64} << 10;

  [[nodiscard]] static Descriptor make(int seals, bool whole = true) {
    Descriptor file(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    EXPECT_EQ(::ftruncate(file.get(), size), 0);
    if (whole) {
      const std::vector<std::byte> content(size);
      EXPECT_EQ(::pwrite(file.get(), content.data(), size, 0), static_cast<ssize_t>(size));
    }
    EXPECT_EQ(::fcntl(file.get(), F_ADD_SEALS, seals), 0);
    return file;
  }
  [[nodiscard]] static int map(Descriptor file, std::uint64_t bytes = size) {
    MappedFile mapped;
    const int error = MappedFile::map({std::move(file), {}}, bytes, mapped);
    EXPECT_EQ(mapped.data() != nullptr, error == 0);
    return error;
  }
};

/// A socket that its last owner's close waits for, and that is full of what nobody reads.
inline Descriptor lingering_socket(Descriptor& other_end) {
  const Descriptor listening(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  EXPECT_EQ(::bind(listening.get(), generic, size), 0);
  EXPECT_EQ(::listen(listening.get(), 1), 0);
  EXPECT_EQ(::getsockname(listening.get(), generic, &size), 0);
  Descriptor made(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(made.get(), generic, size), 0);
  other_end = Descriptor(::accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC));
  const linger minutes{1, 600};
  EXPECT_EQ(::setsockopt(made.get(), SOL_SOCKET, SO_LINGER, &minutes, sizeof(minutes)), 0);
  const std::vector<std::byte> bytes(std::size_t{1} << 16);
  while (::send(made.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
  }
  return made;
}

}  // namespace kvferry::shm::testing
