// SPDX-License-Identifier: Apache-2.0
// Channels whose data connections are encrypted by certificates.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <openssl/ssl.h>

#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp/hello.hpp>

#include "channel_pair.hpp"
#include "common/certificates.hpp"
#include "init_question.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::authority;
using kvferry::testing::CertificateDirectory;
using kvferry::testing::has;
using kvferry::testing::Identity;
using kvferry::testing::issue;
using std::chrono::milliseconds;

constexpr std::size_t certified_pages = 4;

/// What a channel logs.
class Log {
 public:
  [[nodiscard]] LogSink sink() {
    return [this](const LogRecord& record) {
      const std::lock_guard lock(mutex_);
      lines_.push_back(to_string(record));
      changed_.notify_all();
    };
  }
  /// Waits for such a line. @return whether it came.
  [[nodiscard]] bool wait_for(std::string_view event, std::string_view part) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, long_enough, [&] {
      return std::ranges::any_of(lines_, [&](const std::string& line) { return has(line, event) && has(line, part); });
    });
  }
  /// The lines with this event that have this in them.
  [[nodiscard]] std::size_t count(std::string_view event, std::string_view part = {}) {
    const std::lock_guard lock(mutex_);
    return static_cast<std::size_t>(
        std::ranges::count_if(lines_, [&](const std::string& line) { return has(line, event) && has(line, part); }));
  }
  [[nodiscard]] std::string all() {
    const std::lock_guard lock(mutex_);
    std::string text;
    for (const std::string& line : lines_) {
      text += line + '\n';
    }
    return text;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> lines_;
};

class Certified : public ::testing::Test {
 protected:
  [[nodiscard]] TcpOptions with(const CertificateDirectory& directory, Log* log = nullptr) {
    TcpOptions options = plain(log);
    options.certificates = directory.files();
    return options;
  }
  [[nodiscard]] static TcpOptions plain(Log* log = nullptr) {
    TcpOptions options;
    options.keyring = group_keyring();
    if (log != nullptr) {
      options.log_sink = log->sink();
    }
    return options;
  }
  static std::error_code connect(Node& from, Node& to, std::string* diagnostic = nullptr, std::string_view as = "a") {
    std::error_code ec;
    (void)from.channel->lazy_init_peer_connection(as, "b", to.channel->peer_init_url(), std::nullopt,
                                                  {std::nullopt, diagnostic}, ec);
    return ec;
  }
  static void expect_pages_move(Node& from, Node& to, unsigned seed = 1) {
    from.fill(seed);
    const auto all = indexes(certified_pages);
    EXPECT_EQ(from.channel->batched_write(from.pages(certified_pages), {.peer_id = "b", .remote_indexes = all}),
              certified_pages);
    EXPECT_EQ(from.memory, to.memory);
  }
  static std::string refused(TcpOptions options, std::error_code code) {
    try {
      const Node node(certified_pages, std::move(options));
      return "it is taken";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      return error.what();
    }
  }

  const Identity ca_ = authority("ca");
  const Identity a_own_ = issue({.name = "a", .by = &ca_});
  const Identity b_own_ = issue({.name = "b", .by = &ca_});
  const CertificateDirectory a_files_{a_own_, ca_};
  const CertificateDirectory b_files_{b_own_, ca_};
  Log a_log_;
  Log b_log_;
};

TEST_F(Certified, PagesMoveOverSeveralLanesAndTheirPathSaysSo) {
  for (const auto& key : kvferry::testing::keys_of_all_kinds()) {
    const Identity between = issue({.name = "between", .by = &ca_, .key = key, .ca = true});
    const Identity own = issue({.name = "a", .by = &between, .key = key});
    CertificateDirectory::put(a_files_.files().key, own.key_pem());
    CertificateDirectory::put(a_files_.files().chain, own.pem() + between.pem());
    for (const bool with_chain_dials : {true, false}) {
      TcpOptions a_options = with(with_chain_dials ? a_files_ : b_files_);
      TcpOptions b_options = with(with_chain_dials ? b_files_ : a_files_);
      a_options.lanes_per_peer = b_options.lanes_per_peer = 3;
      Node a(certified_pages, std::move(a_options), false);
      Node b(certified_pages, std::move(b_options));
      std::string diagnostic;
      ASSERT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
      const std::string path = a.channel->peer_info("b")->path;
      EXPECT_TRUE(has(path, "3 lanes") && has(path, "TLS 1.3 ") && has(path, " with certificates")) << path;
      expect_pages_move(a, b);
      EXPECT_EQ(b.channel->batched_read(b.pages(certified_pages),
                                        {.peer_id = "a", .remote_indexes = indexes(certified_pages)}),
                certified_pages);
    }
  }
}

TEST_F(Certified, AChainThatDoesNotFitTheSocketsBuffersGoesPartByPart) {
  const Identity between = issue({.name = "between", .by = &ca_, .ca = true, .padding = 25'000});
  for (const CertificateDirectory* files : {&a_files_, &b_files_}) {
    const Identity own = issue({.name = "own", .by = &between, .padding = 25'000});
    CertificateDirectory::put(files->files().key, own.key_pem());
    CertificateDirectory::put(files->files().chain, own.pem() + between.pem());
  }
  TcpOptions a_options = with(a_files_);
  TcpOptions b_options = with(b_files_);
  for (TcpOptions* options : {&a_options, &b_options}) {
    options->send_buffer = options->receive_buffer = 1;  // as small as the kernel makes it
  }
  Node a(certified_pages, std::move(a_options), false);
  Node b(certified_pages, std::move(b_options));
  std::string diagnostic;
  ASSERT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  expect_pages_move(a, b);
}

TEST_F(Certified, AChannelIsNotMadeWithOptionsThatDoNotFitEachOther) {
  const auto invalid = std::make_error_code(std::errc::invalid_argument);
  for (std::string CertificateFiles::*const field :
       {&CertificateFiles::chain, &CertificateFiles::key, &CertificateFiles::trusted}) {
    TcpOptions options = with(a_files_);
    (options.certificates.*field).clear();
    EXPECT_TRUE(has(refused(std::move(options), invalid), " is empty, and others aren't"));
  }
  TcpOptions options = with(a_files_);
  options.keyring = nullptr;
  EXPECT_TRUE(has(refused(std::move(options), invalid), "there is no ChannelOptions::keyring"));
  options = with(a_files_);
  options.encryption = Encryption::off;
  EXPECT_TRUE(has(refused(std::move(options), invalid), "TcpOptions::encryption is off"));
  CertificateDirectory::put(a_files_.files().key, a_own_.key_pem(), 0644);
  EXPECT_TRUE(has(refused(with(a_files_), std::make_error_code(std::errc::permission_denied)), "has mode 0644"));
  options = with(b_files_);
  options.require_encryption = true;
  options.encryption = Encryption::required;
  EXPECT_EQ(refused(std::move(options), {}), "it is taken");
}

TEST_F(Certified, OneSideWithCertificatesAndOneWithoutDoNotMeet) {
  TcpOptions off = plain();
  off.encryption = Encryption::off;
  struct Other {
    TcpOptions options;
    std::string name;
  };
  for (const Other& other :
       {Other{plain(), "none (encrypted by the handshake's key)"}, Other{off, "none (not encrypted)"}}) {
    for (const bool certified_dials : {true, false}) {
      Node a(certified_pages, certified_dials ? with(a_files_) : other.options, false);
      Node b(certified_pages, certified_dials ? other.options : with(b_files_));
      std::string diagnostic;
      EXPECT_EQ(connect(a, b, &diagnostic), errc::encryption_mismatch) << diagnostic;
      // As b says, who answers.
      EXPECT_TRUE(has(diagnostic, "TcpOptions::certificates: " +
                                      (certified_dials ? other.name + " here, given" : "given here, " + other.name) +
                                      " at peer 'a'"))
          << diagnostic;
      EXPECT_EQ(b.channel->stats().handshakes.accepted, 0U);
    }
  }
}

TEST_F(Certified, ACertificateOfAnotherCaIsRefusedOnWhicheverSideAndBothSay) {
  const Identity other_ca = authority("another ca");
  const Identity foreign = issue({.name = "foreign", .by = &other_ca});
  const CertificateDirectory foreign_files(foreign, ca_);  // it takes the others, who don't take it
  for (const std::size_t lanes : {1U, 3U}) {
    for (const bool foreign_dials : {true, false}) {
      Log dialing;
      Log accepting;
      TcpOptions a_options = with(foreign_dials ? foreign_files : a_files_, &dialing);
      TcpOptions b_options = with(foreign_dials ? b_files_ : foreign_files, &accepting);
      a_options.lanes_per_peer = b_options.lanes_per_peer = lanes;
      Node a(certified_pages, std::move(a_options), false);
      Node b(certified_pages, std::move(b_options));
      std::string diagnostic;
      EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed) << diagnostic;
      EXPECT_TRUE(has(diagnostic, "data connection to peer 'b'")) << diagnostic;
      EXPECT_TRUE(has(diagnostic, foreign.sha256())) << diagnostic;
      EXPECT_TRUE(has(diagnostic, foreign_dials ? "it refuses this side's certificate (unknown CA"
                                                : "certificates.trusted doesn't vouch for its certificate: unable to "
                                                  "get local issuer certificate"))
          << diagnostic;
      if (foreign_dials) {
        EXPECT_TRUE(
            accepting.wait_for("stranger_refused", "a data connection of peer 'a': TcpOptions::certificates.trusted"))
            << accepting.all();
      }
      EXPECT_FALSE(a.channel->peer_info("b").has_value()) << "nothing falls back";
    }
  }
}

TEST_F(Certified, ACaThatHasExpiredVouchesForNobody) {
  const Identity late_ca = issue({.name = "late", .ca = true, .from = -7200, .to = -60});
  const Identity own = issue({.name = "own", .by = &late_ca});
  a_files_.set(own, late_ca);
  b_files_.set(own, late_ca);
  Node a(certified_pages, with(a_files_), false);
  Node b(certified_pages, with(b_files_));
  std::string diagnostic;
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed);
  EXPECT_TRUE(has(diagnostic, "certificate has expired") && has(diagnostic, "because of 'CN=late'")) << diagnostic;
}

TEST_F(Certified, ACaThatAnotherOneHasSignedIsTrustedAsItStands) {
  const Identity between = authority("between", &ca_);
  a_files_.set(issue({.name = "a", .by = &between}), between);
  b_files_.set(issue({.name = "b", .by = &between}), between);
  Node a(certified_pages, with(a_files_), false);
  Node b(certified_pages, with(b_files_));
  std::string diagnostic;
  ASSERT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  expect_pages_move(a, b);
  // What has signed it isn't trusted for that.
  a_files_.set(issue({.name = "a", .by = &ca_}), between);
  a.channel->disconnect("b");
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed);
}

/// A question of somebody whose key is known, with this endpoint. @return why it is refused; empty if it is answered.
std::string asked_with(const DialEndpoint& endpoint, Node& asking, Node& asked, std::error_code& ec) {
  kit::InitQuestion asks = question();
  asks.endpoint = encode_side_message(endpoint).encoded();
  std::string diagnostic;
  (void)asking.channel->send_init_side_msg(asked.channel->peer_init_url(), encode_side_message(asks),
                                           {std::nullopt, &diagnostic}, ec);
  return diagnostic;
}

TEST_F(Certified, AQuestionThatTellsOfACertificateSenselesslyIsRefused) {
  Node asking(certified_pages, plain(), false);
  Node certified(certified_pages, with(b_files_));
  Node keyed(certified_pages, plain());
  const Bytes hash(32, std::byte{7});
  std::error_code ec;
  std::string why = asked_with({1, true, hash}, asking, certified, ec);
  EXPECT_FALSE(ec) << why;
  for (Node* const asked : {&certified, &keyed}) {
    for (const std::size_t size : {0U, 31U, 33U, 64U}) {
      why = asked_with({1, true, Bytes(size, std::byte{7})}, asking, *asked, ec);
      EXPECT_EQ(ec, errc::malformed_message) << size;
      EXPECT_TRUE(has(why, "tells of a certificate by " + std::to_string(size) + " bytes; SHA-256 has 32")) << why;
    }
    for (const std::optional<bool> encrypted : {std::optional<bool>(), std::optional(false)}) {
      why = asked_with({1, encrypted, hash}, asking, *asked, ec);
      EXPECT_EQ(ec, errc::malformed_message) << why;
      EXPECT_TRUE(has(why, "tells of a certificate for connections that aren't to be encrypted")) << why;
    }
  }
  why = asked_with({1, true, hash}, asking, keyed, ec);
  EXPECT_EQ(ec, errc::encryption_mismatch) << why;
  why = asked_with({1, true, std::nullopt}, asking, certified, ec);
  EXPECT_EQ(ec, errc::encryption_mismatch) << why;
}

/// Has a key that is known, and answers each handshake with the endpoint that it is told.
class Answering {
 public:
  Answering()
      : service_({.bind_url = "tcp://127.0.0.1:0", .keyring = group_keyring()},
                 [this](const SideMessage& asked, kit::HandshakeService::Reply reply) {
                   if (asked.is<kit::Greeting>()) {
                     reply(encode_side_message(kit::GreetingAnswer{"ok", kit::protocol_version}));
                     return;
                   }
                   kit::InitAnswer answer;
                   answer.status = decode_side_message<kit::InitQuestion>(asked).who.value_or(false)
                                       ? kit::InitAnswer::here
                                       : kit::InitAnswer::ok;
                   answer.transport = "tcp";
                   answer.incarnation = 4711;
                   const std::lock_guard lock(mutex_);
                   answer.endpoint = encode_side_message(endpoint_).encoded();
                   reply(encode_side_message(answer));
                 }) {}

  /// How connecting to it ends.
  std::error_code connect(Node& from, const AcceptEndpoint& endpoint) {
    {
      const std::lock_guard lock(mutex_);
      endpoint_ = endpoint;
    }
    std::error_code ec;
    (void)from.channel->lazy_init_peer_connection("a", "b", service_.bound_url(), std::nullopt, {}, ec);
    return ec;
  }

 private:
  std::mutex mutex_;
  AcceptEndpoint endpoint_;
  kit::HandshakeService service_;
};

TEST_F(Certified, AnAnswerThatTellsOfACertificateSenselesslyIsRefused) {
  const asio::ip::tcp::endpoint any{asio::ip::address_v4::loopback(), 0};
  asio::io_context context;
  asio::ip::tcp::acceptor acceptor(context, any);
  Answering answering;
  AcceptEndpoint sound;
  sound.port = acceptor.local_endpoint().port();
  sound.dial_secret = sound.accept_secret = Bytes(16, std::byte{1});
  sound.tls_identity = Bytes(16, std::byte{2});
  sound.certificate = Bytes(32, std::byte{3});
  const Bytes secret(32, std::byte{4});
  std::vector<AcceptEndpoint> senseless(6, sound);
  senseless[0].certificate = Bytes(31, std::byte{3});
  senseless[1].certificate = Bytes();
  senseless[2].tls_secret = secret;
  senseless[3].tls_identity.reset();
  senseless[4].tls_identity = Bytes(15, std::byte{2});
  senseless[5].certificate.reset();  // an identity, and nothing that it is of
  for (const bool certified : {true, false}) {
    Node a(certified_pages, certified ? with(a_files_) : plain(), false);
    for (std::size_t i = 0; i < senseless.size(); ++i) {
      EXPECT_EQ(answering.connect(a, senseless[i]), errc::malformed_message) << i;
    }
    AcceptEndpoint of_the_other_kind = sound;
    if (certified) {
      of_the_other_kind.certificate.reset();
      of_the_other_kind.tls_secret = secret;
    }
    EXPECT_EQ(answering.connect(a, of_the_other_kind), errc::encryption_mismatch);
  }
  acceptor.non_blocking(true);
  std::error_code ec;
  (void)acceptor.accept(ec);
  EXPECT_EQ(ec, asio::error::would_block) << "none of them leads to a data connection";
}

TEST_F(Certified, FilesThatChangeAreTakenUpWithoutARestart) {
  Node a(certified_pages, with(a_files_, &a_log_), false);
  Node b(certified_pages, with(b_files_, &b_log_));
  ASSERT_FALSE(connect(a, b));
  expect_pages_move(a, b, 1);
  // All of it anew, the authority as well.
  const Identity new_ca = authority("new ca");
  const Identity new_a = issue({.name = "a", .by = &new_ca});
  const Identity new_b = issue({.name = "b", .by = &new_ca});
  a_files_.set(new_a, new_ca);
  expect_pages_move(a, b, 2);  // over the connection that there is
  a.channel->disconnect("b");
  std::string diagnostic;
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed) << "b's is of the old one";
  EXPECT_TRUE(has(diagnostic, "data connection to peer 'b'") &&
              has(diagnostic, "unable to get local issuer certificate") && has(diagnostic, b_own_.sha256()))
      << diagnostic;
  EXPECT_EQ(a_log_.count("certificates_replaced", new_a.sha256()), 1U) << a_log_.all();
  b_files_.set(new_b, new_ca);
  EXPECT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  EXPECT_EQ(b_log_.count("certificates_replaced", new_b.sha256()), 1U) << b_log_.all();
  expect_pages_move(a, b, 3);
}

TEST_F(Certified, ABrokenFileLeavesTheOldOnesInForceAndIsLogged) {
  Node a(certified_pages, with(a_files_), false);
  Node b(certified_pages, with(b_files_, &b_log_));
  const std::string chain = b_files_.files().chain;
  const auto connects_anew = [&] {
    std::error_code ignored;  // the first time there is nobody
    a.channel->disconnect("b", ignored);
    std::string diagnostic;
    EXPECT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  };
  connects_anew();
  CertificateDirectory::put(chain, "-----BEGIN CERTIFICATE-----\nnonsense");
  connects_anew();
  connects_anew();
  EXPECT_EQ(b_log_.count("certificates_not_replaced", chain), 1U) << b_log_.all();
  EXPECT_EQ(b_log_.count("certificates_not_replaced", b_own_.sha256()), 1U) << "that it goes on with";
  const Identity late = issue({.name = "late", .by = &ca_, .key = b_own_.key, .from = -7200, .to = -60});
  CertificateDirectory::put(chain, late.pem());
  connects_anew();
  EXPECT_EQ(b_log_.count("certificates_not_replaced", "has expired"), 1U) << b_log_.all();
  CertificateDirectory::put(b_files_.files().key, b_own_.key_pem(), 0644);
  connects_anew();
  const Identity fresh = issue({.name = "fresh", .by = &ca_, .key = b_own_.key});
  CertificateDirectory::put(chain, fresh.pem());
  CertificateDirectory::put(b_files_.files().key, b_own_.key_pem());
  connects_anew();
  EXPECT_EQ(b_log_.count("certificates_replaced", fresh.sha256()), 1U) << b_log_.all();
}

TEST_F(Certified, NothingFailsWhileFilesAreReplacedUnderTraffic) {
  Node b(certified_pages, with(b_files_, &b_log_));
  std::vector<std::unique_ptr<Node>> dialing;
  for (int i = 0; i < 2; ++i) {
    dialing.push_back(std::make_unique<Node>(certified_pages, with(a_files_, &a_log_), false));
  }
  std::atomic<bool> over = false;
  std::atomic<int> connects = 0;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < dialing.size(); ++i) {
    threads.emplace_back([&, i] {
      Node& a = *dialing[i];
      const std::string id = "a" + std::to_string(i);
      const auto all = indexes(certified_pages);
      while (!over) {
        std::string diagnostic;
        EXPECT_FALSE(connect(a, b, &diagnostic, id)) << diagnostic;
        std::error_code ec;
        for (int k = 0; k < 3 && !ec; ++k) {
          (void)a.channel->batched_read(a.pages(certified_pages), {.peer_id = "b", .remote_indexes = all}, ec);
        }
        EXPECT_FALSE(ec) << ec.message();
        a.channel->disconnect("b", ec);
        ++connects;
      }
    });
  }
  // Each file by itself, as a tool does it that knows nothing of the others.
  for (int round = 0; round < 30; ++round) {
    const int before = connects;
    a_files_.set(issue({.name = "a", .by = &ca_}), ca_);
    b_files_.set(issue({.name = "b", .by = &ca_}), ca_);
    while (connects == before && !HasFailure()) {
      std::this_thread::yield();
    }
  }
  over = true;
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_GT(a_log_.count("certificates_replaced"), 0U);
  EXPECT_GT(b_log_.count("certificates_replaced"), 0U);
}

TEST_F(Certified, ACaIsReplacedInItsStepsAndNothingFails) {
  Node a(certified_pages, with(a_files_, &a_log_), false);
  Node b(certified_pages, with(b_files_, &b_log_));
  std::atomic<bool> over = false;
  std::atomic<int> connects = 0;
  std::thread traffic([&] {
    while (!over) {
      std::string diagnostic;
      EXPECT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
      std::error_code ec;
      (void)a.channel->batched_read(a.pages(certified_pages),
                                    {.peer_id = "b", .remote_indexes = indexes(certified_pages)}, ec);
      EXPECT_FALSE(ec) << ec.message();
      a.channel->disconnect("b", ec);
      ++connects;
    }
  });
  const auto go_on = [&] {
    const int before = connects;
    while (connects < before + 2 && !HasFailure()) {
      std::this_thread::yield();
    }
  };
  const Identity new_ca = authority("new ca");
  const Identity new_a = issue({.name = "a", .by = &new_ca});
  const Identity new_b = issue({.name = "b", .by = &new_ca});
  go_on();
  for (const auto* files : {&a_files_, &b_files_}) {
    CertificateDirectory::put(files->files().trusted, ca_.pem() + new_ca.pem());
    go_on();
  }
  for (const auto& [files, own] : {std::pair(&a_files_, new_a), std::pair(&b_files_, new_b)}) {
    CertificateDirectory::put(files->files().chain, own.pem());
    CertificateDirectory::put(files->files().key, own.key_pem());
    go_on();
  }
  for (const auto* files : {&a_files_, &b_files_}) {
    CertificateDirectory::put(files->files().trusted, new_ca.pem());
    go_on();
  }
  over = true;
  traffic.join();
  EXPECT_EQ(a_log_.count("certificates_replaced", new_a.sha256() + ", valid"), 2U) << a_log_.all();
  EXPECT_EQ(a_log_.count("certificates_replaced", "this side goes on showing"), 2U) << a_log_.all();
}

/// Passes on what either side says, until one ends.
class Splice {
 public:
  Splice(asio::ip::tcp::socket client, asio::ip::tcp::socket server) : ends_{std::move(client), std::move(server)} {
    for (const std::size_t from : {0U, 1U}) {
      threads_[from] = std::thread([this, from] {
        std::array<char, 4096> buffer{};
        std::error_code ec;
        while (!ec) {
          const std::size_t count = ends_[from].read_some(asio::buffer(buffer), ec);
          if (!ec) {
            asio::write(ends_[1 - from], asio::buffer(buffer, count), ec);
          }
        }
        end();
      });
    }
  }
  ~Splice() {
    end();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }
  Splice(const Splice&) = delete;
  Splice& operator=(const Splice&) = delete;

 private:
  void end() {
    for (auto& socket : ends_) {
      ::shutdown(socket.native_handle(), SHUT_RDWR);
    }
  }

  std::array<asio::ip::tcp::socket, 2> ends_;
  std::array<std::thread, 2> threads_;
};

/// Has a certificate of the CA's, and repeats the name of a handshake that it has seen in the clear on the way.
class Eavesdropper {
 public:
  /// @param opening the first message of an honest connection of the handshake.
  Eavesdropper(asio::ip::tcp::socket socket, const Identity& shown, const std::vector<unsigned char>& opening)
      : socket_(std::move(socket)) {
    constexpr std::array<unsigned char, 4> extension{0xff, 0x4b, 0, 16};
    // Not std::ranges::search, whose result Clang 14 can't use.
    const auto found = std::search(opening.begin(), opening.end(), extension.begin(), extension.end());
    EXPECT_LE(extension.size() + identity_.size(), static_cast<std::size_t>(opening.end() - found));
    if (!::testing::Test::HasFailure()) {
      std::memcpy(identity_.data(), &*found + extension.size(), identity_.size());
    }
    SSL_CTX_use_certificate(context_.get(), shown.certificate.get());
    SSL_CTX_use_PrivateKey(context_.get(), shown.key.get());
    kvferry::testing::name_handshake(context_.get(), identity_);
    ssl_.reset(SSL_new(context_.get()));
    SSL_set_fd(ssl_.get(), socket_.native_handle());
  }

  [[nodiscard]] SSL* ssl() const { return ssl_.get(); }
  [[nodiscard]] asio::ip::tcp::socket& socket() { return socket_; }

 private:
  asio::ip::tcp::socket socket_;
  std::array<std::byte, 16> identity_{};
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_{SSL_CTX_new(TLS_client_method()), &SSL_CTX_free};
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_{nullptr, &SSL_free};
};

/// Stands in the way of data connections to b.
class CertifiedInBetween : public Certified {
 protected:
  CertifiedInBetween() {
    TcpOptions options = with(b_files_, &b_log_);
    options.advertised_data_address = "127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port());
    options.hello_timeout = std::chrono::hours(1);  // it is no help here
    b_.emplace(certified_pages, std::move(options));
  }

  [[nodiscard]] asio::ip::tcp::socket accepted() {
    pollfd waiting{acceptor_.native_handle(), POLLIN, 0};
    EXPECT_EQ(::poll(&waiting, 1, static_cast<int>(milliseconds(long_enough).count())), 1);
    return acceptor_.accept();
  }
  [[nodiscard]] asio::ip::tcp::socket to_b() {
    asio::ip::tcp::socket socket(context_);
    socket.connect({asio::ip::address_v4::loopback(), b_->channel->data_port()});
    return socket;
  }

  /// The first message on a connection.
  static std::vector<unsigned char> opening_of(asio::ip::tcp::socket& client) {
    std::vector<unsigned char> opening(5);
    asio::read(client, asio::buffer(opening));
    opening.resize(5 + static_cast<std::size_t>(opening[3] << 8) + opening[4]);
    asio::read(client, asio::buffer(opening.data() + 5, opening.size() - 5));
    return opening;
  }

  asio::io_context context_;
  asio::ip::tcp::acceptor acceptor_{context_, {asio::ip::address_v4::loopback(), 0}};
  std::optional<Node> b_;
};

TEST_F(CertifiedInBetween, WhatTheHandshakeToldIsShownThoughFilesHaveBeenReplacedSince) {
  Node a(certified_pages, with(a_files_, &a_log_), false);
  auto connecting = std::async(std::launch::async, [&] {
    std::string diagnostic;
    const auto ec = connect(a, *b_, &diagnostic);
    return std::pair(ec, diagnostic);
  });
  auto client = accepted();  // so the handshake is over
  const Identity new_ca = authority("new ca");
  const Identity new_a = issue({.name = "a", .by = &new_ca});
  const Identity new_b = issue({.name = "b", .by = &new_ca});
  a_files_.set(new_a, new_ca);
  b_files_.set(new_b, new_ca);
  // Both sides take them up for other handshakes.
  Node other(certified_pages, with(a_files_));
  std::error_code ec;
  (void)a.channel->lazy_init_peer_connection("a", "other", other.channel->peer_init_url(), std::nullopt, {}, ec);
  EXPECT_FALSE(ec) << ec.message();
  (void)b_->channel->lazy_init_peer_connection("b", "other", other.channel->peer_init_url(), std::nullopt, {}, ec);
  EXPECT_FALSE(ec) << ec.message();
  EXPECT_EQ(a_log_.count("certificates_replaced", new_a.sha256()), 1U);
  EXPECT_EQ(b_log_.count("certificates_replaced", new_b.sha256()), 1U);
  // The dialing side has to come again, for one handshake still.
  std::error_code ignored;
  client.set_option(asio::socket_base::linger(true, 0), ignored);
  client.close(ignored);
  const Splice splice(accepted(), to_b());
  const auto [ended, diagnostic] = connecting.get();
  EXPECT_FALSE(ended) << diagnostic;
  expect_pages_move(a, *b_);
}

TEST_F(CertifiedInBetween, WhoNamesNoHandshakeHearsNothing) {
  const auto heard_for = [this](std::string_view said) {
    auto socket = to_b();
    std::error_code ec;
    asio::write(socket, asio::buffer(said), ec);
    std::string heard;
    std::array<char, 4096> buffer{};
    for (ec.clear(); !ec;) {
      heard.append(buffer.data(), socket.read_some(asio::buffer(buffer), ec));
    }
    return heard;
  };
  const Hello hello;  // of a plain dialer's
  EXPECT_EQ(heard_for({reinterpret_cast<const char*>(&hello), sizeof(hello)}), "");
  EXPECT_EQ(heard_for("GET / HTTP/1.1\r\n\r\n"), "");
  // One with a certificate of the CA's that knows of no handshake.
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free);
  SSL_CTX_use_certificate(context.get(), a_own_.certificate.get());
  SSL_CTX_use_PrivateKey(context.get(), a_own_.key.get());
  const std::unique_ptr<SSL, decltype(&SSL_free)> ssl(SSL_new(context.get()), &SSL_free);
  auto stranger = to_b();
  SSL_set_fd(ssl.get(), stranger.native_handle());
  EXPECT_NE(SSL_connect(ssl.get()), 1);
  EXPECT_EQ(SSL_get0_peer_certificate(ssl.get()), nullptr);
  EXPECT_EQ(BIO_number_read(SSL_get_rbio(ssl.get())), 0U);
  stranger.close();
  EXPECT_TRUE(b_log_.wait_for("stranger_refused", "a data connection is of no handshake, or not with certificates"));
  EXPECT_EQ(b_->channel->stats().handshakes.accepted, 0U);
}

TEST_F(CertifiedInBetween, ACertificateOfTheCaThatNobodyToldOfIsRefused) {
  Node a(certified_pages, with(a_files_), false);
  auto connecting = std::async(std::launch::async, [&] { return connect(a, *b_); });
  auto client = accepted();
  const auto opening = opening_of(client);
  const Identity untold = issue({.name = "a", .by = &ca_});
  Eavesdropper eavesdropper(to_b(), untold, opening);
  EXPECT_EQ(SSL_connect(eavesdropper.ssl()), 1) << "it is through before the other side has looked at its certificate";
  std::array<char, 100> buffer{};
  EXPECT_LE(SSL_read(eavesdropper.ssl(), buffer.data(), buffer.size()), 0);
  eavesdropper.socket().close();
  EXPECT_TRUE(b_log_.wait_for("stranger_refused",
                              "a data connection of peer 'a': it shows a certificate with SHA-256 " + untold.sha256() +
                                  ", and has told of one with SHA-256 " + a_own_.sha256()))
      << b_log_.all();

  // The honest one isn't disturbed.
  auto server = to_b();
  asio::write(server, asio::buffer(opening));
  const Splice splice(std::move(client), std::move(server));
  EXPECT_FALSE(connecting.get());
  expect_pages_move(a, *b_);
}

TEST_F(CertifiedInBetween, WhoIsRefusedAndGoesOnAndOnKeepsNobodyFromHisWork) {
  Node friendly(certified_pages, with(a_files_), false);
  auto greeting = std::async(std::launch::async, [&] { return connect(friendly, *b_, nullptr, "friendly"); });
  auto friends = accepted();
  const Splice friendly_splice(std::move(friends), to_b());
  ASSERT_FALSE(greeting.get());

  Node a(certified_pages, with(a_files_), false);
  auto connecting = std::async(std::launch::async, [&] { return connect(a, *b_); });
  auto client = accepted();
  const auto opening = opening_of(client);
  Eavesdropper eavesdropper(to_b(), issue({.name = "a", .by = &ca_}), opening);
  ASSERT_EQ(SSL_connect(eavesdropper.ssl()), 1);
  std::promise<std::size_t> over;
  std::thread flood([&] {
    // Far more than what is read of it and what lies in sockets' buffers. Each piece is larger than what is read at a time, so
    // that there is always more.
    constexpr std::size_t most = std::size_t{256} << 20;
    const std::vector<char> nonsense(std::size_t{1} << 18);
    std::size_t sent = 0;
    for (ssize_t part = 1; part > 0 && sent < most;) {
      part = ::send(eavesdropper.socket().native_handle(), nonsense.data(), nonsense.size(), MSG_NOSIGNAL);
      sent += static_cast<std::size_t>(std::max<ssize_t>(part, 0));
    }
    eavesdropper.socket().close();
    over.set_value(sent);
  });
  EXPECT_LT(over.get_future().get(), std::size_t{64} << 20) << "it is listened to for as long as it likes";
  flood.join();
  expect_pages_move(friendly, *b_);
  auto server = to_b();
  asio::write(server, asio::buffer(opening));
  const Splice splice(std::move(client), std::move(server));
  EXPECT_FALSE(connecting.get());
  expect_pages_move(a, *b_, 2);
}

}  // namespace
}  // namespace kvferry::tcp::testing
