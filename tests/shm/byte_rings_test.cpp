// SPDX-License-Identifier: Apache-2.0
// The rings of a connection: their bytes in order, and who is to hear a bell.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <future>
#include <initializer_list>
#include <memory>
#include <optional>
#include <random>
#include <semaphore>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/held.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/patience.hpp"
#include "shm/handed_files.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace byte_rings {
namespace {

using tcp::testing::fill;

constexpr std::size_t whole = RingFile::ring_bytes;
using kvferry_test::long_enough;

ssize_t send(ByteRings& rings, std::span<const std::byte> bytes) {
  const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  return rings.send({&piece, 1});
}
ssize_t receive(ByteRings& rings, std::span<std::byte> bytes) {
  const iovec piece{bytes.data(), bytes.size()};
  return rings.receive({&piece, 1});
}
ssize_t receive_payload(ByteRings& rings, std::span<std::byte> bytes) {
  const iovec piece{bytes.data(), bytes.size()};
  return rings.receive_payload({&piece, 1});
}

/// Both sides in one process, with the memory of both: what a peer may do to its own, a test can do.
class TwoSides : public ::testing::Test {
 protected:
  struct alignas(4096) File {
    std::array<std::byte, RingFile::bytes> bytes{};
    std::array<std::byte, 4096> behind{};  ///< Nobody's.
  };

  static RingWords& words(File& file) { return *reinterpret_cast<RingWords*>(file.bytes.data()); }
  static void lie(File& file, std::uint64_t RingWords::*word, std::uint64_t value) {
    std::atomic_ref(words(file).*word).store(value);
  }
  [[nodiscard]] bool untouched_behind() const {
    const auto empty = [](const auto& memory) {
      return std::ranges::all_of(memory, [](std::byte one) { return one == std::byte{}; });
    };
    return empty(one_file_->behind) && empty(other_file_->behind);
  }

  std::unique_ptr<File> one_file_ = std::make_unique<File>();
  std::unique_ptr<File> other_file_ = std::make_unique<File>();
  ByteRings one_{one_file_->bytes.data(), other_file_->bytes.data()};
  ByteRings other_{other_file_->bytes.data(), one_file_->bytes.data()};
  std::vector<std::byte> bytes_ = std::vector<std::byte>(2 * whole);
  std::vector<std::byte> received_ = std::vector<std::byte>(2 * whole);
};

TEST_F(TwoSides, ARingTakesWhatItHoldsAndNoMore) {
  fill(bytes_, 1);
  EXPECT_EQ(receive(other_, received_), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(send(one_, bytes_), ssize_t{whole});
  EXPECT_EQ(send(one_, bytes_), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(receive(other_, std::span(received_).first(10)), 10);
  EXPECT_EQ(send(one_, std::span(bytes_).subspan(whole)), 10);
  EXPECT_EQ(receive(other_, std::span(received_).subspan(10)), ssize_t{whole});
  EXPECT_TRUE(std::ranges::equal(std::span(received_).first(whole + 10), std::span(bytes_).first(whole + 10)));
  EXPECT_EQ(receive(other_, received_), -1);
  EXPECT_EQ(errno, EAGAIN);
}

TEST_F(TwoSides, BytesOfAnyLengthsComeInOrderRoundAndRound) {
  std::mt19937 random(1);
  std::vector<std::byte> all(20 * whole);
  fill(all, 2);
  std::size_t sent = 0;
  std::size_t got = 0;
  while (got < all.size()) {
    std::array<iovec, 3> pieces;
    std::size_t wanted = 0;
    for (iovec& piece : pieces) {
      const std::size_t length = std::min<std::size_t>(random() % (whole / 2), all.size() - sent - wanted);
      piece = {all.data() + sent + wanted, length};
      wanted += length;
    }
    if (const ssize_t count = random() % 2 == 0 ? one_.send(pieces) : one_.send_payload(pieces); count > 0) {
      sent += static_cast<std::size_t>(count);
    }
    const auto into = std::span(received_).first(1 + random() % whole);
    const ssize_t count = random() % 2 == 0 ? receive(other_, into) : receive_payload(other_, into);
    if (count > 0) {
      ASSERT_EQ(std::memcmp(received_.data(), all.data() + got, static_cast<std::size_t>(count)), 0) << "at " << got;
      got += static_cast<std::size_t>(count);
    }
  }
  EXPECT_TRUE(untouched_behind());
}

TEST_F(TwoSides, MemoryThatIsGoneIsAnErrorAndTakesNothing) {
  fill(bytes_, 3);
  ASSERT_EQ(send(one_, std::span(bytes_).first(8192)), 8192);
  auto* const memory = static_cast<std::byte*>(
      ::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(::mprotect(memory + 4096, 4096, PROT_NONE), 0);
  EXPECT_EQ(receive_payload(other_, {memory + 4096, 4096}), -1);
  EXPECT_EQ(errno, EFAULT);
  const ssize_t got = receive_payload(other_, {memory, 8192});
  EXPECT_GT(got, 0);
  EXPECT_LE(got, 4096);
  EXPECT_EQ(std::memcmp(memory, bytes_.data(), static_cast<std::size_t>(std::max<ssize_t>(got, 0))), 0);
  ::munmap(memory, 8192);
}

TEST_F(TwoSides, SentMemoryThatIsGoneIsAnErrorAndPutsNothing) {
  ASSERT_TRUE(one_.kernel_copies());
  auto* const memory = static_cast<std::byte*>(
      ::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  fill({memory, 4096}, 4);
  std::memcpy(bytes_.data(), memory, 4096);
  ASSERT_EQ(::mprotect(memory + 4096, 4096, PROT_NONE), 0);
  const iovec gone{memory + 4096, 4096};
  EXPECT_EQ(one_.send_payload({&gone, 1}), -1);
  EXPECT_EQ(errno, EFAULT);
  EXPECT_EQ(receive(other_, received_), -1);
  const iovec half_gone{memory, 8192};
  const ssize_t put = one_.send_payload({&half_gone, 1});
  EXPECT_GT(put, 0);
  EXPECT_LE(put, 4096);
  EXPECT_EQ(receive(other_, received_), put);
  EXPECT_EQ(std::memcmp(received_.data(), bytes_.data(), static_cast<std::size_t>(std::max<ssize_t>(put, 0))), 0);
  ::munmap(memory, 8192);
}

TEST_F(TwoSides, TellHowMuchRoomThereIs) {
  EXPECT_GE(one_.room(100), 100U);
  ASSERT_EQ(send(one_, std::span(bytes_).first(whole - 10)), ssize_t{whole - 10});
  EXPECT_EQ(one_.room(100), 10U);
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_EQ(one_.room(100), 0U);
  ASSERT_EQ(receive(other_, std::span(received_).first(20)), 20);
  EXPECT_EQ(one_.room(100), 20U);
}

TEST_F(TwoSides, WhoSaysMoreThanARingHoldsIsFoundOut) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(100)), 100);
  for (const std::uint64_t lie_told : {std::uint64_t{whole + 1}, std::uint64_t{0} - 1, std::uint64_t{1} << 63}) {
    lie(*one_file_, &RingWords::sent, lie_told);
    EXPECT_FALSE(other_.may_wait(false)) << "it would wait for what can't be";
    for (const auto call : {receive, receive_payload}) {
      EXPECT_EQ(call(other_, received_), -1);
      EXPECT_EQ(errno, tcp::senseless_peer);
    }
  }
  // Bytes that were received already can't be sent again.
  lie(*one_file_, &RingWords::sent, 100);
  ASSERT_EQ(receive(other_, received_), 100);
  lie(*one_file_, &RingWords::sent, 99);
  EXPECT_EQ(receive(other_, received_), -1);
  EXPECT_EQ(errno, tcp::senseless_peer);
  EXPECT_TRUE(untouched_behind());
}

TEST_F(TwoSides, WhoTakesMoreThanWasSentIsFoundOut) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(whole)), ssize_t{whole});
  for (const std::uint64_t lie_told : {std::uint64_t{whole + 1}, std::uint64_t{1} << 63}) {
    lie(*other_file_, &RingWords::taken, lie_told);
    EXPECT_FALSE(one_.may_wait(true)) << "it would wait for room that can't be";
    EXPECT_EQ(send(one_, bytes_), -1);
    EXPECT_EQ(errno, tcp::senseless_peer);
  }
  lie(*other_file_, &RingWords::taken, 0);
  EXPECT_EQ(send(one_, bytes_), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_TRUE(untouched_behind());
}

TEST_F(TwoSides, ABellIsDueToWhoWaitsAndOnce) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_FALSE(one_.bell_due()) << "nobody waits";
  EXPECT_FALSE(other_.may_wait(false)) << "there is something already";
  ASSERT_EQ(receive(other_, received_), 10);
  EXPECT_TRUE(other_.may_wait(false));
  EXPECT_FALSE(one_.bell_due()) << "there is nothing";
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_TRUE(one_.bell_due());
  EXPECT_FALSE(one_.bell_due()) << "it has rung";
  ASSERT_EQ(receive(other_, received_), 10);
  other_.waits_no_more();
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_FALSE(one_.bell_due());
  ASSERT_EQ(receive(other_, received_), 10);
  EXPECT_TRUE(other_.may_wait(false));
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_TRUE(one_.bell_due()) << "it waits again";
}

TEST_F(TwoSides, ABellIsDueToWhoWaitsForRoomWhenThereIsSome) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(whole)), ssize_t{whole});
  EXPECT_TRUE(one_.may_wait(true));
  ASSERT_EQ(receive(other_, std::span(received_).first(100)), 100);
  EXPECT_FALSE(other_.bell_due()) << "not worth it";
  EXPECT_TRUE(one_.may_wait(true)) << "likewise";
  ASSERT_EQ(receive(other_, std::span(received_).first(whole / 2)), ssize_t{whole / 2});
  EXPECT_TRUE(other_.bell_due());
  EXPECT_FALSE(one_.may_wait(true));
}

/// Two threads, each of which sleeps whenever it may: a bell that is lost stops them for good.
TEST_F(TwoSides, NoBellIsLostBetweenTwoThreads) {
  std::counting_semaphore<> bell_of_one(0);
  std::counting_semaphore<> bell_of_other(0);
  constexpr std::size_t total = 64 * whole;
  std::atomic<bool> failed{false};
  std::thread reader([&] {
    std::mt19937 random(1);
    std::vector<std::byte> into(whole);
    std::size_t got = 0;
    while (got < total && !failed) {
      const ssize_t count = receive(other_, std::span(into).first(1 + random() % 5000));
      if (count > 0) {
        for (ssize_t i = 0; i < count; ++i) {
          const auto expected = static_cast<std::byte>((got + static_cast<std::size_t>(i)) % 251);
          failed = failed || into[static_cast<std::size_t>(i)] != expected;
        }
        got += static_cast<std::size_t>(count);
        if (other_.bell_due()) {
          bell_of_one.release();
        }
      } else if (other_.may_wait(false)) {
        failed = failed || !bell_of_other.try_acquire_for(long_enough);
        other_.waits_no_more();
      }
    }
  });
  std::mt19937 random(2);
  std::vector<std::byte> from(5000);
  for (std::size_t sent = 0; sent < total && !failed;) {
    const std::size_t wanted = std::min<std::size_t>(1 + random() % from.size(), total - sent);
    for (std::size_t i = 0; i < wanted; ++i) {
      from[i] = static_cast<std::byte>((sent + i) % 251);
    }
    const ssize_t count = send(one_, std::span(from).first(wanted));
    if (count > 0) {
      sent += static_cast<std::size_t>(count);
      if (one_.bell_due()) {
        bell_of_other.release();
      }
    } else if (one_.may_wait(true)) {
      failed = failed || !bell_of_one.try_acquire_for(long_enough);
      one_.waits_no_more();
    }
  }
  reader.join();
  EXPECT_FALSE(failed) << "other bytes came, or somebody waited in vain";
}

TEST(RingFiles, AreWhatAPeerMapsAndCantWriteTo) {
  RingFile own;
  Descriptor file;
  ASSERT_EQ(RingFile::make(own, file), 0);
  own.data()[RingFile::words_bytes] = std::byte{7};
  EXPECT_EQ(::mmap(nullptr, RingFile::bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0), MAP_FAILED);
  EXPECT_EQ(::ftruncate(file.get(), 0), -1);
  const std::byte other{8};
  EXPECT_EQ(::pwrite(file.get(), &other, 1, 0), -1);
  MappedFile mapped;
  ASSERT_EQ(MappedFile::map({std::move(file), {}}, RingFile::bytes, mapped), 0);
  EXPECT_EQ(mapped.data()[RingFile::words_bytes], std::byte{7});
}

}  // namespace
}  // namespace byte_rings
}  // namespace kvferry::shm::testing
