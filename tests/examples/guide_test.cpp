// SPDX-License-Identifier: Apache-2.0
// The C++ of docs/guide.md and docs/security.md, as it stands there, in programs that run. pages.guide and
// pages.security look for it here.
#include <gtest/gtest.h>

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <future>
#include <iostream>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/co_spawn.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/redirect_error.hpp>
#include <asio/use_awaitable.hpp>
#include <asio/use_future.hpp>

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/completion_queue.hpp>
#ifdef KVFERRY_TEST_RDMA
#include <kvferry/rdma_transfer_channel.hpp>
#endif
#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/fault_channel.hpp>

#include "examples/peer_pair.hpp"
#include "examples/peer_process.hpp"

namespace kvferry_test {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t page_size = 4096;

kvferry::TcpOptions options_for(std::vector<std::byte>& cache) {
  kvferry::TcpOptions options;
  options.regions = {{cache.data(), cache.size(), page_size}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.handshake_timeout = 60s;
  return options;
}

/// "prefill", connected to "decode".
class GuideTest : public testing::Test {
 protected:
  GuideTest() {
    channel.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
    std::ranges::fill(prefill_cache, std::byte{0x2a});
  }

  /// The first pages of this side's.
  std::vector<kvferry::ConstBuffer> first_pages(std::size_t count) const {
    std::vector<kvferry::ConstBuffer> pages;
    for (std::size_t page = 0; page < count; ++page) {
      pages.emplace_back(&prefill_cache[page * page_size], page_size);
    }
    return pages;
  }
  bool has_arrived(std::size_t page) const {
    return std::ranges::count(std::span(decode_cache).subspan(page * page_size, page_size), std::byte{0x2a}) == page_size;
  }

  std::vector<std::byte> decode_cache = std::vector<std::byte>(16 * page_size);
  std::vector<std::byte> prefill_cache = std::vector<std::byte>(16 * page_size);
  kvferry::TcpTransferChannel decode{options_for(decode_cache)};
  kvferry::TcpTransferChannel channel{options_for(prefill_cache)};
};

TEST_F(GuideTest, CallbacksAndFutures) {
  asio::io_context io;
  const auto pages = first_pages(2);
  const std::array<std::uint64_t, 2> indexes{3, 4};
  const kvferry::TransferSpec spec{.peer_id = "decode", .remote_indexes = indexes};
  auto work = asio::make_work_guard(io);
  // clang-format off
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // the page leaves out what the handler does with them
  channel.async_batched_write(pages, spec, asio::bind_executor(io, [](std::error_code ec, std::size_t written) { /* ... */ }));
#pragma GCC diagnostic pop
  std::future<std::size_t> written = channel.async_batched_write(pages, spec, asio::use_future);
  // clang-format on
  EXPECT_EQ(written.get(), 2U);
  EXPECT_TRUE(has_arrived(3) && has_arrived(4));
  work.reset();
  EXPECT_EQ(io.run(), 1U);
}

#ifdef ASIO_HAS_CO_AWAIT
// clang-format off
asio::awaitable<bool> push(kvferry::BaseTransferChannel& channel, std::vector<kvferry::ConstBuffer> pages,
                           std::vector<std::uint64_t> indexes) {
  std::error_code ec;
  std::string why;
  co_await channel.async_batched_write(pages, {.peer_id = "decode", .remote_indexes = indexes, .diagnostic = &why},
                                       asio::redirect_error(asio::use_awaitable, ec));
  if (ec) {
    std::cerr << kvferry::error_name(ec) << ": " << why << "\n";
  }
  co_return !ec;
}
// clang-format on

TEST_F(GuideTest, Coroutines) {
  asio::io_context io;
  auto pushed = asio::co_spawn(io, push(channel, first_pages(1), {7}), asio::use_future);
  auto refused = asio::co_spawn(io, push(channel, first_pages(1), {16}), asio::use_future);
  testing::internal::CaptureStderr();
  io.run();
  EXPECT_TRUE(pushed.get());
  EXPECT_TRUE(has_arrived(7));
  EXPECT_FALSE(refused.get());
  EXPECT_NE(testing::internal::GetCapturedStderr().find("16"), std::string::npos);
}
#endif

TEST_F(GuideTest, CancelsBySignal) {
  asio::io_context io;
  const std::vector<kvferry::MutableBuffer> buffers{{prefill_cache.data(), page_size}};
  std::error_code ended;
  const auto handler = [&](std::error_code ec, std::size_t) { ended = ec; };
  auto work = asio::make_work_guard(io);
  // clang-format off
  asio::cancellation_signal stop;  // outlives the operation
  channel.async_batched_recv(buffers, {.peer_id = "decode", .tag = 1},
                             asio::bind_cancellation_slot(stop.slot(), asio::bind_executor(io, handler)));
  asio::post(io, [&stop] { stop.emit(asio::cancellation_type::total); });
  // clang-format on
  io.run_one();
  io.run_one();
  EXPECT_EQ(ended, kvferry::errc::cancelled);
}

TEST_F(GuideTest, ErrorsOfABatch) {
  const auto pages = first_pages(2);
  const std::array<std::uint64_t, 2> indexes{5, 6};
  const auto left = 30s;
  // clang-format off
  std::error_code ec;
  std::string why;
  std::vector<std::error_code> statuses(pages.size());
  channel.batched_write(pages, {.peer_id = "decode", .remote_indexes = indexes, .timeout = left, .statuses = statuses, .diagnostic = &why}, ec);
  if (ec == kvferry::condition::may_still_land) { /* the pages stay this request's until a repeat has succeeded, or their owner has fenced */ }
  if (ec == kvferry::condition::retryable) { /* repeat for those whose status is an error, while the request has time */ }
  // clang-format on
  EXPECT_FALSE(ec) << why;
  EXPECT_TRUE(has_arrived(5) && has_arrived(6));
}

#ifdef KVFERRY_TEST_RDMA
TEST(GuideRoads, RdmaBetweenTheOthers) {
  // clang-format off
  kvferry::AutoOptions options;
  options.roads = kvferry::AutoTransferChannel::default_roads();  // shm, tcp
  kvferry::RdmaOptions rdma;
  rdma.rails = {{"mlx5_0"}, {"mlx5_1"}};
  options.roads.insert(options.roads.begin() + 1, kvferry::road<kvferry::RdmaTransferChannel>("rdma", rdma));
  options.require = {"shm", "rdma"};  // nothing goes over TCP
  // clang-format on
  std::vector<std::string> names;
  for (const auto& road : options.roads) {
    names.push_back(road.name);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"shm", "rdma", "tcp"}));
}
#endif

TEST(GuideSharedMemory, IsMapped) {
  constexpr std::size_t cache_size = 16 * page_size;
  kvferry::ShmOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  // clang-format off
  kvferry::SharedRegion cache(cache_size);  // of huge pages: cache(cache_size, kvferry::HugePages::yes)
  options.regions = {cache.region(page_size)};
  // clang-format on
  std::ranges::fill(cache.bytes(), std::byte{0x2a});
  kvferry::ShmTransferChannel owner(options);
  kvferry::ShmTransferChannel reader(kvferry::ShmOptions{});
  reader.lazy_init_peer_connection("reader", "owner", owner.peer_init_url());
  std::vector<std::byte> page(page_size);
  const std::array<std::uint64_t, 1> index{9};
  reader.batched_read({kvferry::MutableBuffer(page)}, {.peer_id = "owner", .remote_indexes = index});
  EXPECT_EQ(std::ranges::count(page, std::byte{0x2a}), static_cast<std::ptrdiff_t>(page_size));
}

struct PagePool {
  void release(std::span<const std::uint64_t> pages) { free.insert(free.end(), pages.begin(), pages.end()); }
  std::vector<std::uint64_t> free;
};

// clang-format off
void give_back(kvferry::BaseTransferChannel& channel, std::string_view peer, PagePool& pool, std::span<const std::uint64_t> pages) {
  std::error_code ec;
  channel.fence(peer, std::chrono::milliseconds(500), ec);
  if (!ec || ec == kvferry::errc::closed) {  // nothing lands in a closed channel's memory either
    pool.release(pages);
  }
}
// clang-format on

TEST_F(GuideTest, FencesBeforePagesAreFree) {
  PagePool pool;
  const std::array<std::uint64_t, 2> pages{1, 2};
  give_back(decode, "prefill", pool, pages);
  EXPECT_EQ(pool.free, (std::vector<std::uint64_t>{1, 2}));
  decode.close();
  give_back(decode, "prefill", pool, pages);
  EXPECT_EQ(pool.free.size(), 4U);
}

void offer(kvferry::BaseTransferChannel& channel, std::byte* data, std::size_t size) {
  // clang-format off
  const std::uint32_t number = channel.add_region({data, size, page_size});
  channel.notify("prefill", std::as_bytes(std::span(&number, 1)));  // or by any other road
  // ...
  channel.remove_region(number);  // returns when nothing can touch the memory any more
  ::munmap(data, size);
  // clang-format on
}

TEST_F(GuideTest, RegionsThatComeAndGo) {
  const std::size_t size = 4 * page_size;
  void* const mapped = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  offer(decode, static_cast<std::byte*>(mapped), size);

  const auto notification = channel.receive_notification(30s);
  std::uint32_t number = 0;
  ASSERT_EQ(notification.payload.size(), sizeof number);
  std::memcpy(&number, notification.payload.data(), sizeof number);
  EXPECT_EQ(number, 1U);
  const std::array<std::uint64_t, 1> index{0};
  std::error_code ec;
  channel.batched_write(first_pages(1), {.peer_id = "decode", .remote_indexes = index, .remote_region = number}, ec);
  EXPECT_EQ(ec, kvferry::errc::region_gone);
}

std::size_t wait_for_ranks(kvferry::BaseTransferChannel& channel, std::uint64_t request) {
  // clang-format off
  // Each of eight prefill ranks: spec.notification = rank_bytes; spec.notification_key = request; channel.batched_write(...)
  const auto parts = channel.receive_notifications(request, 8, std::chrono::seconds(5));
  if (parts.size() < 8) { /* the others have not come: fence those peers before the pages are used for something else */ }
  // clang-format on
  return parts.size();
}

TEST_F(GuideTest, NotificationsOfAllRanks) {
  constexpr std::uint64_t request = 17;
  for (std::uint64_t rank = 0; rank < 8; ++rank) {
    const auto rank_bytes = std::as_bytes(std::span(&rank, 1));
    const std::array<std::uint64_t, 1> index{rank};
    kvferry::TransferSpec spec{.peer_id = "decode", .remote_indexes = index};
    spec.notification = rank_bytes;
    spec.notification_key = request;
    channel.batched_write(first_pages(1), spec);
  }
  EXPECT_EQ(wait_for_ranks(decode, request), 8U);
}

struct PrefillRequest {
  std::uint64_t number = 0;

  static constexpr std::string_view side_message_type = "GuidePrefillRequest";
  static constexpr auto side_message_fields() {
    return std::tuple(kvferry::side_message_field("number", &PrefillRequest::number));
  }
};

// clang-format off
class Prefill : public kvferry::TcpTransferChannel {
 public:
  explicit Prefill(kvferry::TcpOptions options) : TcpTransferChannel(std::move(options)) { answer_side_messages(); }
  ~Prefill() override { close(); }

  kvferry::SideMessage handle_init_side_msg(const kvferry::SideMessage& message) override {
    if (!message.is<PrefillRequest>()) {
      return TcpTransferChannel::handle_init_side_msg(message);
    }
    const auto request = kvferry::decode_side_message<PrefillRequest>(message);
    // ... put it into the queue of what is to be computed
    return kvferry::encode_side_message(request);
  }
};
// clang-format on

TEST_F(GuideTest, MessagesOfYourOwn) {
  kvferry::TcpOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  // clang-format off
  options.hold_side_messages = true;  // until the object is whole; then answer_side_messages()
  // clang-format on
  const Prefill prefill(options);
  const std::string url = prefill.peer_init_url();
  const PrefillRequest request{41};
  // clang-format off
  // The other side:
  const kvferry::SideMessage answer = channel.send_init_side_msg(url, kvferry::encode_side_message(request));
  // clang-format on
  EXPECT_EQ(kvferry::decode_side_message<PrefillRequest>(answer).number, 41U);
}

TEST_F(GuideTest, OneLoopForEverything) {
  std::vector<kvferry::MutableBuffer> objects{{prefill_cache.data(), page_size}};
  const std::array<std::uint64_t, 1> index{0};
  const kvferry::TransferSpec spec{.peer_id = "decode", .remote_indexes = index};
  constexpr std::uint64_t request = 17;
  // clang-format off
  kvferry::CompletionQueue queue;  // queue.descriptor(): for epoll, or for nothing
  kvferry::OperationHandle handle = channel.async_batched_read(objects, spec, queue.token(request));
  // clang-format on
  pollfd readable{queue.descriptor(), POLLIN, 0};
  ASSERT_EQ(::poll(&readable, 1, 30'000), 1);
  // clang-format off
  // Once a step:
  std::array<kvferry::CompletionEntry, 64> ended;
  const std::size_t count = queue.drain(ended);  // user_data, error, count of each
  // clang-format on
  ASSERT_EQ(count, 1U);
  EXPECT_EQ(ended[0].user_data, request);
  EXPECT_FALSE(ended[0].error);
  EXPECT_EQ(ended[0].count, 1U);
  EXPECT_TRUE(handle.ended());
}

TEST(GuideMetadata, ConnectsByIt) {
  std::vector<std::byte> decode_cache(4 * page_size);
  std::vector<std::byte> prefill_cache(page_size, std::byte{0x2a});
  kvferry::TcpTransferChannel decode(options_for(decode_cache));
  kvferry::TcpTransferChannel prefill(options_for(prefill_cache));
  const std::vector<kvferry::ConstBuffer> pages{{prefill_cache.data(), page_size}};
  const std::array<std::uint64_t, 1> indexes{3};
  // clang-format off
  const std::vector<std::byte> metadata = decode.local_metadata("decode");  // to be sent to the other side
  // clang-format on
  // clang-format off
  const kvferry::PeerInfo peer = prefill.connect("prefill", metadata);
  prefill.batched_write(pages, {.peer_id = peer.id, .remote_indexes = indexes});
  // clang-format on
  EXPECT_EQ(decode_cache[3 * page_size], std::byte{0x2a});
}

TEST_F(GuideTest, FaultsInTests) {
  std::vector<std::byte> cache(page_size);
  const auto options = options_for(cache);
  const std::string url = decode.peer_init_url();
  const auto pages = first_pages(1);
  const std::array<std::uint64_t, 1> indexes{0};
  // clang-format off
  kvferry::testing::FaultChannel faulty(std::make_unique<kvferry::TcpTransferChannel>(options));
  faulty.lazy_init_peer_connection("tested", "decode", url);
  faulty.fail(2, kvferry::errc::connection_lost);  // the second transfer from now on
  // clang-format on
  const kvferry::TransferSpec spec{.peer_id = "decode", .remote_indexes = indexes};
  std::error_code ec;
  faulty.batched_write(pages, spec, ec);
  EXPECT_FALSE(ec) << ec.message();
  faulty.batched_write(pages, spec, ec);
  EXPECT_EQ(ec, kvferry::errc::connection_lost);
  faulty.batched_write(pages, spec, ec);
  EXPECT_FALSE(ec) << ec.message();
}

TEST(GuideRanges, OfSeveralRegions) {
  constexpr std::size_t block_bytes = 512;
  std::vector<std::byte> keys(16 * block_bytes);
  std::vector<std::byte> values(16 * block_bytes);
  kvferry::TcpOptions options;
  options.regions = {{keys.data(), keys.size(), block_bytes}, {values.data(), values.size(), block_bytes}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::TcpTransferChannel decode(options);
  kvferry::TcpTransferChannel channel(kvferry::TcpOptions{});
  channel.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
  const std::vector<std::byte> key(block_bytes, std::byte{1});
  const std::vector<std::byte> value(block_bytes, std::byte{2});
  const kvferry::ConstBuffer key_block(key);
  const kvferry::ConstBuffer value_block(value);
  // clang-format off
  // Two tensors of the peer's are two regions; a block of each.
  const std::vector<kvferry::RemoteRange> ranges{kvferry::RemoteRange::contiguous(0, 5 * block_bytes, block_bytes),
                                                 kvferry::RemoteRange::contiguous(1, 9 * block_bytes, block_bytes)};
  channel.batched_write({key_block, value_block}, {.peer_id = "decode", .remote_ranges = ranges});
  // clang-format on
  EXPECT_TRUE(std::ranges::equal(key, std::span(keys).subspan(5 * block_bytes, block_bytes)));
  EXPECT_TRUE(std::ranges::equal(value, std::span(values).subspan(9 * block_bytes, block_bytes)));
}

TEST(GuideRanges, HalfOfTheHeads) {
  constexpr std::size_t heads = 4;
  constexpr std::size_t head_bytes = 64;
  constexpr std::size_t tokens = 8;
  // Each head has a byte of its own.
  std::vector<std::vector<std::byte>> pages(2);
  for (auto& page : pages) {
    for (std::size_t i = 0; i < tokens * heads; ++i) {
      page.insert(page.end(), head_bytes, static_cast<std::byte>(i % heads));
    }
  }
  const std::vector<std::uint64_t> peer_pages{3, 1};
  std::vector<std::byte> cache(4 * tokens * heads / 2 * head_bytes, std::byte{0xff});
  kvferry::TcpOptions options;
  options.regions = {{cache.data(), cache.size(), tokens * heads / 2 * head_bytes}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::TcpTransferChannel rank(options);
  kvferry::TcpTransferChannel channel(kvferry::TcpOptions{});
  channel.lazy_init_peer_connection("prefill", "rank-0", rank.peer_init_url());
  // clang-format off
  const kvferry::LocalStride half{heads / 2 * head_bytes, heads * head_bytes};
  std::vector<kvferry::ConstBuffer> objects;
  std::vector<kvferry::RemoteRange> ranges;
  for (std::size_t i = 0; i < pages.size(); ++i) {
    // The buffer ends where its last block ends.
    objects.emplace_back(pages[i].data(), (tokens - 1) * half.stride + half.block_size);
    ranges.push_back(kvferry::RemoteRange::contiguous(0, peer_pages[i] * tokens * half.block_size, tokens * half.block_size));
  }
  const std::vector<kvferry::LocalStride> strides(pages.size(), half);
  channel.batched_write(objects, {.peer_id = "rank-0", .remote_ranges = ranges, .local_strides = strides});
  // clang-format on
  for (std::size_t page = 0; page < 4; ++page) {
    for (std::size_t i = 0; i < tokens * heads / 2 * head_bytes; ++i) {
      const auto expected = page % 2 == 0 ? std::byte{0xff} : static_cast<std::byte>(i / head_bytes % (heads / 2));
      ASSERT_EQ(cache[page * tokens * heads / 2 * head_bytes + i], expected) << "page " << page << ", byte " << i;
    }
  }
}

TEST(GuideLogs, GoToTheProgramsSink) {
  testing::internal::CaptureStderr();
  std::ostringstream log;
  std::streambuf* const before = std::clog.rdbuf(log.rdbuf());
  // clang-format off
  kvferry::set_log_sink([](const kvferry::LogRecord& record) { std::clog << kvferry::to_string(record) << '\n'; }, kvferry::LogLevel::warning);
  // clang-format on
  std::vector<std::byte> cache(page_size);
  {
    kvferry::TcpTransferChannel decode(options_for(cache));
    kvferry::TcpOptions options;
    options.handshake_timeout = 60s;
    kvferry::TcpTransferChannel first(options);
    first.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
    // A busy machine may keep the first from answering within the second that it has: then another one is it, and the next is refused.
    std::list<kvferry::TcpTransferChannel> others;
    std::error_code ec;
    for (bool in_time = false; !ec && !in_time;) {
      const auto asked = std::chrono::steady_clock::now();
      others.emplace_back(options).lazy_init_peer_connection("prefill", "decode", decode.peer_init_url(), {}, {}, ec);
      in_time = std::chrono::steady_clock::now() - asked < 1s;
    }
    EXPECT_EQ(ec, kvferry::errc::identity_conflict);
  }
  kvferry::set_log_sink({});
  std::clog.rdbuf(before);
  EXPECT_NE(log.str().find("identity_conflict"), std::string::npos) << log.str();
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST(GuideKeys, FromTheFilesOfTheTool) {
  const TemporaryFolder folder;
  const std::string key_file = folder.file("decode-3.key");
  const std::string peers_file = folder.file("peers");
  PeerProcess keygen(KVFERRY_TOOLS_DIR "/kvferry-keygen", {key_file, "decode-3"});
  ASSERT_EQ(keygen.wait_for_exit(), 0) << keygen.errors();
  std::ofstream(peers_file) << keygen.output();
  kvferry::TcpOptions options;
  // clang-format off
  // "/etc/kvferry/decode-3.key" and "/etc/kvferry/peers"
  options.keyring = std::make_shared<kvferry::Keyring>(kvferry::read_key_pair(key_file), kvferry::read_peer_keys(peers_file));
  // clang-format on
  kvferry::TcpTransferChannel channel(options);
  EXPECT_EQ(channel.transport(), "tcp");
  const kvferry::CertificateFiles none{folder.file("chain"), folder.file("key"), folder.file("ca")};
  const auto& [chain_file, chain_key_file, ca_file] = none;
  // clang-format off
  // "/etc/kvferry/tls.crt", "/etc/kvferry/tls.key" and "/etc/kvferry/ca.crt"
  options.certificates = {chain_file, chain_key_file, ca_file};
  // clang-format on
  EXPECT_THROW(kvferry::TcpTransferChannel{options}, kvferry::TransferError) << "which aren't there";
}

}  // namespace
}  // namespace kvferry_test
