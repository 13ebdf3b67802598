// SPDX-License-Identifier: Apache-2.0
// Memory that isn't there, or not as it is needed, when the bytes are to be moved: the operation fails, and nothing else.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <future>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"
#include <kvferry/tcp/frame.hpp>
#include <kvferry/testing/own_loopback.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// Memory of which all, or all from some byte on, can be taken away.
class Mapping {
 public:
  explicit Mapping(std::size_t size) : size_(size), file_(::memfd_create("test", MFD_CLOEXEC)) {
    if (::ftruncate(file_, static_cast<off_t>(size)) != 0) {
      throw std::system_error(errno, std::system_category(), "ftruncate");
    }
    void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED) {
      throw std::system_error(errno, std::system_category(), "mmap");
    }
    data_ = static_cast<std::byte*>(memory);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    ::munmap(data_, size_);
    ::close(file_);
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  void protect(std::size_t from, int protection) const { EXPECT_EQ(::mprotect(data_ + from, size_ - from, protection), 0); }
  void truncate(std::size_t size) const { EXPECT_EQ(::ftruncate(file_, static_cast<off_t>(size)), 0); }

 private:
  const std::size_t size_;
  const int file_;
  std::byte* data_ = nullptr;
};

struct Case {
  std::size_t page;
  std::size_t good;  ///< Bytes of the object that are there.
  std::size_t lanes;
  bool checksums = false;
  bool encrypted = false;
};

class UnmappedMemory : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr std::size_t others = 8;
  static constexpr std::size_t pages = others + 1;  // the last one is the bad one
  static constexpr std::uint64_t bad_page = others;

  UnmappedMemory() {
    const auto options = [&](const Mapping& memory, bool listens) {
      TcpOptions made;
      made.handshake_timeout = long_enough;
      made.regions = {{memory.data(), memory.size(), GetParam().page}};
      made.lanes_per_peer = GetParam().lanes;
      made.checksums = GetParam().checksums;
      made.keyring = GetParam().encrypted ? group_keyring() : nullptr;
      if (listens) {
        made.peer_init_url = kvferry::testing::own_loopback_url();
      }
      return made;
    };
    b_.emplace(options(b_memory_, true));
    a_.emplace(options(a_memory_, false));
    a_->lazy_init_peer_connection("a", "b", b_->peer_init_url());
    path_ = a_->peer_info("b")->path;
  }

  [[nodiscard]] static std::size_t page() { return GetParam().page; }
  [[nodiscard]] MutableBuffer object(const Mapping& memory, std::size_t index) const {
    return {memory.data() + index * page(), page()};
  }
  /// Where the part of the last page that is to go begins.
  [[nodiscard]] static std::size_t bad_from() { return bad_page * page() + GetParam().good; }

  struct Result {
    std::error_code ec;
    std::size_t count = 0;
    std::string diagnostic;
  };

  /// Starts `bad` among good writes and reads, which all succeed.
  template <class Start>
  Result among_others(Start bad) {
    std::vector<std::future<std::size_t>> good;
    const auto start_others = [&] {
      for (std::uint64_t i = 0; i < others; ++i) {
        const std::vector<std::uint64_t> index{i};
        if (i % 2 == 0) {
          good.push_back(a_->async_batched_write({ConstBuffer(object(a_memory_, i))},
                                                 {.peer_id = "b", .remote_indexes = index}, asio::use_future));
        } else {
          good.push_back(a_->async_batched_read({object(a_memory_, i)}, {.peer_id = "b", .remote_indexes = index},
                                                asio::use_future));
        }
      }
    };
    start_others();
    std::promise<Result> promise;
    auto result = std::make_shared<Result>();
    bad(&result->diagnostic, [&promise, result](std::error_code ec, std::size_t count) {
      promise.set_value({ec, count, result->diagnostic});
    });
    start_others();
    const Result ended = promise.get_future().get();
    for (auto& other : good) {
      EXPECT_EQ(other.get(), 1U);
    }
    return ended;
  }

  void expect_memory_fault(const Result& result) {
    EXPECT_EQ(result.ec, errc::memory_fault) << result.ec.message();
    EXPECT_EQ(result.ec, std::errc::bad_address);
    EXPECT_NE(result.ec, condition::retryable);
    EXPECT_EQ(result.count, 0U);
    EXPECT_NE(result.diagnostic.find("memory"), std::string::npos) << result.diagnostic;
    EXPECT_EQ(a_->peer_info("b").value_or(PeerInfo{}).path, path_) << "the connection is still the first one";
    EXPECT_EQ(a_->batched_write({ConstBuffer(object(a_memory_, 0))}, {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
    EXPECT_EQ(b_->batched_write({ConstBuffer(object(b_memory_, 0))}, {.peer_id = "a", .remote_indexes = indexes(1)}), 1U);
  }

  const std::vector<std::uint64_t> bad_index_{bad_page};
  Mapping a_memory_{pages * GetParam().page};
  Mapping b_memory_{pages * GetParam().page};
  std::optional<TcpTransferChannel> b_;
  std::optional<TcpTransferChannel> a_;
  std::string path_;
};

INSTANTIATE_TEST_SUITE_P(Sizes, UnmappedMemory,
                         ::testing::Values(Case{4096, 0, 1}, Case{std::size_t{64} << 10, std::size_t{60} << 10, 1},
                                           Case{std::size_t{1} << 20, 0, 1},
                                           Case{std::size_t{4} << 20, std::size_t{3} << 20, 1},
                                           Case{std::size_t{4} << 20, std::size_t{300} << 10, 2},
                                           Case{4096, 0, 1, true},
                                           Case{std::size_t{4} << 20, std::size_t{300} << 10, 2, true},
                                           Case{4096, 0, 1, false, true},
                                           Case{std::size_t{64} << 10, std::size_t{60} << 10, 1, false, true},
                                           Case{std::size_t{4} << 20, std::size_t{300} << 10, 2, true, true}),
                         [](const auto& param) {
                           return std::to_string(param.param.good) + "Of" + std::to_string(param.param.page) + "Lanes" +
                                  std::to_string(param.param.lanes) + (param.param.checksums ? "Checked" : "") +
                                  (param.param.encrypted ? "Encrypted" : "");
                         });

TEST_P(UnmappedMemory, AWriteOfWhatCanNotBeReadFailsAloneAndTellsNobody) {
  a_memory_.protect(bad_from(), PROT_NONE);
  const std::vector<std::byte> notification(5, std::byte{1});
  expect_memory_fault(among_others([&](std::string* diagnostic, auto done) {
    a_->async_batched_write({ConstBuffer(object(a_memory_, bad_page))},
                            {.peer_id = "b", .remote_indexes = bad_index_, .notification = notification, .diagnostic = diagnostic},
                            done);
  }));
  const std::vector<std::byte> next(3, std::byte{2});
  a_->batched_write({ConstBuffer(object(a_memory_, 0))},
                    {.peer_id = "b", .remote_indexes = indexes(1), .notification = next});
  EXPECT_EQ(b_->receive_notification(std::chrono::seconds(30)).payload, next) << "the first one must not come";
}

TEST_P(UnmappedMemory, AReadOfWhatThePeerCanNotReadFailsAlone) {
  b_memory_.protect(bad_from(), PROT_NONE);
  expect_memory_fault(among_others([&](std::string* diagnostic, auto done) {
    a_->async_batched_read({object(a_memory_, bad_page)},
                           {.peer_id = "b", .remote_indexes = bad_index_, .diagnostic = diagnostic}, done);
  }));
}

TEST_P(UnmappedMemory, AReadToWhereItCanNotWriteFailsAlone) {
  a_memory_.protect(bad_from(), PROT_READ);
  expect_memory_fault(among_others([&](std::string* diagnostic, auto done) {
    a_->async_batched_read({object(a_memory_, bad_page)},
                           {.peer_id = "b", .remote_indexes = bad_index_, .diagnostic = diagnostic}, done);
  }));
}

TEST_P(UnmappedMemory, AWriteToARegionWhoseFileIsCutShortFailsAloneAndTellsNobody) {
  b_memory_.truncate(bad_from());
  const std::vector<std::byte> notification(5, std::byte{1});
  expect_memory_fault(among_others([&](std::string* diagnostic, auto done) {
    a_->async_batched_write({ConstBuffer(object(a_memory_, bad_page))},
                            {.peer_id = "b", .remote_indexes = bad_index_, .notification = notification, .diagnostic = diagnostic},
                            done);
  }));
  const std::vector<std::byte> next(3, std::byte{2});
  a_->batched_write({ConstBuffer(object(a_memory_, 0))},
                    {.peer_id = "b", .remote_indexes = indexes(1), .notification = next});
  EXPECT_EQ(b_->receive_notification(std::chrono::seconds(30)).payload, next) << "the first one must not come";
}

TEST_P(UnmappedMemory, ASendOfWhatCanNotBeReadFailsOnBothSides) {
  a_memory_.protect(bad_from(), PROT_NONE);
  // Objects in the same frame are lost with it.
  const std::size_t good = page() >= max_chunk_bytes ? 1 : 0;
  auto recv = std::async(std::launch::async, [&] {
    std::error_code ec;
    EXPECT_EQ(b_->batched_recv({object(b_memory_, 1), object(b_memory_, bad_page)}, {.peer_id = "a", .tag = 7}, ec), good);
    return ec;
  });
  std::error_code ec;
  const std::size_t sent = a_->batched_send({ConstBuffer(object(a_memory_, 1)), ConstBuffer(object(a_memory_, bad_page))},
                                            {.peer_id = "b", .tag = 7}, ec);
  EXPECT_EQ(ec, errc::memory_fault);
  EXPECT_EQ(recv.get(), errc::memory_fault);
  EXPECT_EQ(sent, good);
}

TEST_P(UnmappedMemory, ARecvToWhereItCanNotWriteFailsOnBothSides) {
  b_memory_.protect(bad_from(), PROT_READ);
  auto recv = std::async(std::launch::async, [&] {
    std::error_code ec;
    EXPECT_EQ(b_->batched_recv({object(b_memory_, bad_page)}, {.peer_id = "a", .tag = 7}, ec), 0U);
    return ec;
  });
  expect_memory_fault(among_others([&](std::string* diagnostic, auto done) {
    a_->async_batched_send({ConstBuffer(object(a_memory_, bad_page))},
                           {.peer_id = "b", .tag = 7, .diagnostic = diagnostic}, done);
  }));
  EXPECT_EQ(recv.get(), errc::memory_fault);
}

}  // namespace
}  // namespace kvferry::tcp::testing
