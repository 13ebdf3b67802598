// SPDX-License-Identifier: Apache-2.0
// A log sink that calls the channel whose record it gets, on whichever of its threads that is.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <functional>
#include <future>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/log.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/fault_channel.hpp>

#include "channel_pair.hpp"
#include "peer_identity.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using Codes = std::vector<std::error_code>;

/// What all forms that wait, or take locks that a thread may hold while it logs, end with.
Codes blocking_calls(BaseTransferChannel& channel, const std::string& url) {
  Codes codes(15);
  std::vector<std::byte> memory(page_size);
  const std::vector<MutableBuffer> page{{memory.data(), memory.size()}};
  const std::vector<ConstBuffer> source{{memory.data(), memory.size()}};
  const std::vector<std::uint64_t> first{0};
  const TransferSpec spec{.peer_id = "b", .remote_indexes = first};
  channel.batched_write(source, spec, codes[0]);
  channel.batched_read(page, spec, codes[1]);
  channel.batched_send(source, {.peer_id = "b"}, codes[2]);
  channel.batched_recv(page, {.peer_id = "b"}, codes[3]);
  (void)channel.lazy_init_peer_connection("a", "b", url, {}, {}, codes[4]);
  (void)channel.send_init_side_msg(url, encode_side_message(P2PInitSideMsg{}), {}, codes[5]);
  (void)channel.receive_notification({}, codes[6]);
  channel.notify("b", ConstBuffer(memory.data(), 1), {}, codes[7]);
  (void)channel.wait_peer_event({}, codes[8]);
  channel.fence("b", {}, codes[9]);
  channel.disconnect("b", codes[10]);
  (void)channel.connect("a", ConstBuffer(memory.data(), memory.size()), {}, codes[11]);
  (void)channel.receive_notifications(1, 1, {}, codes[12]);
  channel.remove_region(0, {}, codes[13]);
  (void)channel.add_region({memory.data(), memory.size(), page_size}, codes[14]);
  return codes;
}

/// A channel whose sink calls it with each record.
class Called {
 public:
  explicit Called(std::function<Codes(TcpTransferChannel& own)> call) : call_(std::move(call)), node_(4, options()) {
    own_ = &*node_.channel;
  }

  [[nodiscard]] Node& node() { return node_; }
  /// By the names of the events.
  [[nodiscard]] std::map<std::string, Codes> ends() {
    const std::lock_guard lock(mutex_);
    return ends_;
  }

 private:
  [[nodiscard]] TcpOptions options() {
    TcpOptions made;
    made.log_level = LogLevel::debug;
    made.log_sink = [this](const LogRecord& record) {
      if (TcpTransferChannel* const own = own_) {
        Codes codes = call_(*own);
        const std::lock_guard lock(mutex_);
        ends_.try_emplace(std::string(record.event), std::move(codes));
      }
    };
    return made;
  }

  const std::function<Codes(TcpTransferChannel& own)> call_;
  std::atomic<TcpTransferChannel*> own_ = nullptr;
  std::mutex mutex_;
  std::map<std::string, Codes> ends_;
  Node node_;
};

/// Has records of many kinds made, on the caller's thread, on I/O threads and on that of the handshakes.
void have_much_logged(Called& called) {
  Node other(4);
  const std::string url = other.channel->peer_init_url();
  TcpTransferChannel& own = *called.node().channel;
  std::error_code ec;
  own.lazy_init_peer_connection("a", "b", url, {}, {.timeout = long_enough}, ec);
  EXPECT_FALSE(ec) << ec.message();
  // Another channel of b's name. A busy machine may keep b from answering within the second that it has: then the other one is b, and the
  // next one is refused.
  std::list<Node> impostors;
  for (bool in_time = false; !ec && !in_time;) {
    const SecondToAnswer second;
    impostors.emplace_back(4).channel->lazy_init_peer_connection("b", "a", own.peer_init_url(), {}, {}, ec);
    in_time = !second.is_over();
  }
  EXPECT_TRUE(ec);
  own.batched_recv(called.node().pages(1), {.peer_id = "b", .timeout = std::chrono::milliseconds(1)}, ec);
  EXPECT_EQ(ec, errc::timed_out);
  own.disconnect("b", ec);
  EXPECT_FALSE(ec) << ec.message();
  own.close();
}

const std::set<std::string> logged{"peer_connected", "identity_conflict", "operation_failed", "peer_lost",
                                   "channel_closed"};

void expect_refusals_of(Called& called, std::size_t calls) {
  have_much_logged(called);
  const auto ends = called.ends();
  for (const std::string& event : logged) {
    ASSERT_TRUE(ends.contains(event)) << event;
    EXPECT_EQ(ends.at(event), Codes(calls, errc::would_deadlock)) << event;
  }
}

/// What its `close` throws.
Codes close(BaseTransferChannel& channel) {
  try {
    channel.close();
  } catch (const TransferError& error) {
    return {error.code()};
  }
  return {{}};
}

TEST(LogSinks, ThatCloseTheirChannelAreToldThatTheyCannot) {
  Called called([](TcpTransferChannel& own) { return close(own); });
  expect_refusals_of(called, 1);
}

TEST(LogSinks, ThatCloseAChannelAndCatchNothingAreToldOnStandardError) {
  Called called([](TcpTransferChannel& own) -> Codes {
    own.close();
    return {};
  });
  ::testing::internal::CaptureStderr();
  have_much_logged(called);
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("call_in_log_sink: close() in a log sink may wait"), std::string::npos) << said;
}

TEST(LogSinks, ThatCloseADecoratedChannelCloseNothing) {
  kvferry::testing::FaultChannel faults(std::make_unique<TcpTransferChannel>(TcpOptions()));
  std::error_code refused;
  kit::Logger logger([&](const LogRecord&) {
    try {
      faults.close();
    } catch (const TransferError& error) {
      refused = error.code();
    }
  });
  logger.log(LogLevel::error, "test", {}, {}, [] { return "text"; });
  EXPECT_EQ(refused, errc::would_deadlock);
  std::error_code ec;
  const std::vector<std::uint64_t> first{0};
  std::vector<std::byte> memory(page_size);
  const std::vector<ConstBuffer> source{{memory.data(), memory.size()}};
  (void)faults.batched_write(source, {.peer_id = "b", .remote_indexes = first}, ec);
  EXPECT_EQ(ec, errc::unknown_peer) << "it goes on";
}

TEST(LogSinks, ThatMakeBlockingCallsAreToldThatTheyCannot) {
  Called called([](TcpTransferChannel& own) { return blocking_calls(own, own.peer_init_url()); });
  expect_refusals_of(called, 15);
}

// Its records may come on any of the threads of either, with locks held.
TEST(LogSinks, ThatCloseAnotherChannelAreToldThatTheyCannot) {
  Node other(4);
  Called called([&](TcpTransferChannel&) { return close(*other.channel); });
  have_much_logged(called);
  EXPECT_EQ(called.ends().at("peer_connected"), Codes(1, errc::would_deadlock));
  std::error_code ec;
  (void)other.channel->wait_peer_event(std::chrono::milliseconds(0), ec);
  EXPECT_EQ(ec, errc::timed_out) << "it goes on";
}

TEST(LogSinks, HaveAnotherThreadCloseTheirChannel) {
  std::promise<void> wanted;
  std::atomic<bool> told = false;
  TcpOptions options;
  options.log_sink = [&](const LogRecord& record) {
    if (record.event == "peer_connected" && !told.exchange(true)) {
      wanted.set_value();
    }
  };
  Node a(4, options);
  Node b(4);
  std::thread closing([&] {
    wanted.get_future().wait();
    a.channel->close();
  });
  std::error_code ec;
  b.channel->lazy_init_peer_connection("b", "a", a.channel->peer_init_url(), {}, {}, ec);
  closing.join();
}

// Whatever is said of keys, pages and messages, on either side.
TEST(LogSinks, HearNoSecretAndNoContent) {
  const KeyPair pair = make_key_pair();
  const auto keyring =
      std::make_shared<const Keyring>(pair, std::vector<PeerKey>{{std::string(PeerKey::any_id), pair.public_key}});
  std::mutex mutex;
  std::string heard;
  TcpOptions options;
  options.keyring = keyring;
  options.log_level = LogLevel::debug;
  options.log_sink = [&](const LogRecord& record) {
    const std::lock_guard lock(mutex);
    heard += to_string(record) + '\n';
  };
  const std::string content = "what nobody is to read";
  {
    Node a(4, options, false);
    Node b(4, options);
    const std::string url = b.channel->peer_init_url();
    std::memcpy(a.memory.data(), content.data(), content.size());
    const auto* const bytes = reinterpret_cast<const std::byte*>(content.data());
    const std::vector<std::byte> note(bytes, bytes + content.size());
    std::error_code ec;
    a.channel->lazy_init_peer_connection("a", "b", url);
    (void)a.channel->send_init_side_msg(url, encode_side_message(P2PInitSideRetMsg{content}), {},
                                        ec);  // has no handler
    EXPECT_TRUE(ec);
    EXPECT_EQ(
        a.channel->batched_write(a.pages(1), {.peer_id = "b", .remote_indexes = indexes(1), .notification = note}), 1U);
    const std::vector<std::uint64_t> outside{99};
    a.channel->batched_write(a.pages(1), {.peer_id = "b", .remote_indexes = outside, .notification = note}, ec);
    EXPECT_TRUE(ec);
    a.channel->batched_send(a.pages(1), {.peer_id = "b", .timeout = std::chrono::milliseconds(1)}, ec);
    EXPECT_EQ(ec, errc::timed_out);
    a.channel->disconnect("b", ec);
  }
  EXPECT_NE(heard.find("peer_connected"), std::string::npos);
  EXPECT_NE(heard.find("operation_failed"), std::string::npos) << heard;
  EXPECT_EQ(heard.find(content), std::string::npos) << heard;
  EXPECT_EQ(heard.find(pair.secret_key.text()), std::string::npos) << heard;
}

void destroy_in_the_sink() {
  std::optional<TcpTransferChannel> own;
  TcpOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.log_sink = [&](const LogRecord& record) {
    if (record.event == "peer_connected") {
      own.reset();
    }
  };
  own.emplace(options);
  Node b(4);
  std::error_code ec;
  b.channel->lazy_init_peer_connection("b", "a", own->peer_init_url(), {}, {.timeout = long_enough}, ec);
  std::promise<void>().get_future().wait_for(long_enough);
}

TEST(LogSinksDeathTest, ThatDestroyAChannelEndTheProcessWithASentence) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(destroy_in_the_sink(), "close\\(\\) in a log sink");
}

}  // namespace
}  // namespace kvferry::tcp::testing
