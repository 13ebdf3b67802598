// SPDX-License-Identifier: Apache-2.0
//
// One deadline has one teller: a call that is out of time says the same, whichever of the timers below it is first.
#include <gtest/gtest.h>

#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"
#include "common/lasting_port.hpp"
#include "common/unanswering_port.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds short_time{40};
constexpr int deadlines_tried = 25;

/// How often this thread has gone to sleep.
long sleeps() {
  rusage usage{};
  EXPECT_EQ(::getrusage(RUSAGE_THREAD, &usage), 0);
  return usage.ru_nvcsw;
}

/// Makes many calls with this little time. @return their sentences, without those of calls that never slept: on a busy machine their time
/// was over before they came to wait for anything.
std::set<std::string> sentences(const std::function<void(std::string& diagnostic, std::error_code& ec)>& call) {
  std::set<std::string> all;
  int waited = 0;
  for (int tries = 0; waited < deadlines_tried && tries < 40 * deadlines_tried; ++tries) {
    std::string diagnostic;
    std::error_code ec;
    const long before = sleeps();
    call(diagnostic, ec);
    EXPECT_EQ(ec, errc::timed_out) << diagnostic;
    if (sleeps() != before) {
      all.insert(std::move(diagnostic));
      ++waited;
    }
  }
  EXPECT_EQ(waited, deadlines_tried);
  return all;
}

std::set<std::string> sentences_of_connecting(TcpTransferChannel& channel, const std::string& url) {
  return sentences([&](std::string& diagnostic, std::error_code& ec) {
    channel.lazy_init_peer_connection("a", "peer", url, {}, {.timeout = short_time, .diagnostic = &diagnostic}, ec);
  });
}

TEST(DeadlineSentence, NobodyAnswersTheHandshake) {
  const kvferry::test::UnansweringPort nobody("127.0.0.1");
  const std::string url = "tcp://127.0.0.1:" + std::to_string(nobody.port());
  Node a(1, {}, false);
  EXPECT_EQ(sentences_of_connecting(*a.channel, url),
            std::set<std::string>{
                "peer 'peer', " + url +
                ": no usable connection or answer within the 40 ms that the call was given: no answer from " + url});
}

TEST(DeadlineSentence, NobodyAnswersOnTheDataConnection) {
  MutePeer mute;
  const std::string url = mute.node.channel->peer_init_url();
  Node a(1, {}, false);
  for (const std::string& sentence : sentences_of_connecting(*a.channel, url)) {
    // A handshake that was not answered in so little time is said to be one.
    EXPECT_TRUE(sentence.ends_with("that the call was given: the data connection was not welcomed") ||
                sentence.ends_with("that the call was given: no answer from " + url))
        << sentence;
  }
}

TEST(DeadlineSentence, AnOperationSaysForWhatItWaited) {
  TcpOptions options;
  options.peer_init_url = kvferry_test::lasting_url();
  std::optional<Node> b(std::in_place, 1, options);
  Node a(1, {}, false);
  a.channel->lazy_init_peer_connection("a", "b", b->channel->peer_init_url());
  const std::string url = b->channel->peer_init_url();
  const auto port = static_cast<std::uint16_t>(std::stoul(url.substr(url.rfind(':') + 1)));
  b.reset();
  while (a.channel->remote_xfer_handler_exists("b")) {
    std::this_thread::yield();
  }
  const kvferry::test::UnansweringPort gone(kvferry::testing::own_loopback(), port);
  EXPECT_EQ(sentences([&](std::string& diagnostic, std::error_code& ec) {
              a.channel->batched_write(
                  a.pages(1),
                  {.peer_id = "b", .remote_indexes = indexes(1), .timeout = short_time, .diagnostic = &diagnostic}, ec);
            }),
            std::set<std::string>{"write of 1 objects, peer 'b': the deadline passed: no answer from " + url +
                                  " (0 transferred)"});
}

TEST(DeadlineSentence, NobodyAnswersTheSideMessage) {
  const kvferry::test::UnansweringPort nobody("127.0.0.1");
  const std::string url = "tcp://127.0.0.1:" + std::to_string(nobody.port());
  Node a(1, {}, false);
  EXPECT_EQ(sentences([&](std::string& diagnostic, std::error_code& ec) {
              a.channel->send_init_side_msg(url, SideMessage(), {.timeout = short_time, .diagnostic = &diagnostic}, ec);
            }),
            std::set<std::string>{url + ": no usable connection or answer within the 40 ms that the call was given"});
}

}  // namespace
}  // namespace kvferry::tcp::testing
