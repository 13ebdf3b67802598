// SPDX-License-Identifier: Apache-2.0
// The first bytes of data connections, on either side, over loopback: whatever is said, in whatever pieces and order, a link is
// made of exactly those connections that have proved that they belong to it, nobody else is told a secret, each attempt ends
// once, and no connection is left over.
#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/refusals.hpp>

#include "fuzz/descriptors.hpp"
#include "fuzz/input.hpp"
#include "fuzz/liar.hpp"
#include <kvferry/tcp/data_acceptor.hpp>
#include <kvferry/tcp/data_dialer.hpp>
#include <kvferry/tcp/frame_reader.hpp>

namespace {

using namespace kvferry;
using namespace kvferry::fuzz;
using namespace std::chrono_literals;
using tcp::Hello;

constexpr std::size_t most_wires = 16;
constexpr std::size_t most_actions = 64;
constexpr std::uint64_t own_incarnation = 77;

class Host final : public kit::LinkHost {
 public:
  explicit Host(std::uint64_t incarnation) {
    peer_.id = "peer";
    peer_.incarnation = incarnation;
  }
  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override {
    return kit::RegionList::of({});
  }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte>, std::uint64_t) override { return true; }
  void link_failed(const kit::Link&, std::error_code) override {}
  void when_abandoned(std::function<void()> drop) override { drop_ = std::move(drop); }

  void abandon() {
    if (const auto drop = std::exchange(drop_, {})) {
      drop();
    }
  }

 private:
  kit::PeerDescription peer_;
  std::function<void()> drop_;
};

/// An attempt, as the side sees it that takes part in it honestly.
struct Attempt {
  std::shared_ptr<Host> host;
  tcp::AcceptEndpoint endpoint;
  bool abandoned = false;
  int calls = 0;
  std::error_code ec;
  std::shared_ptr<kit::Link> link;

  [[nodiscard]] kit::LinkHandler handler() {
    return [this](std::error_code failed, std::shared_ptr<kit::Link> made, const std::string&) {
      ++calls;
      ec = failed;
      link = std::move(made);
    };
  }
};

struct Talk {
  Wire wire;
  std::vector<std::byte> said;
  std::vector<std::byte> heard;

  void hear(int milliseconds = 0) {
    const auto bytes = wire.hear(milliseconds);
    heard.insert(heard.end(), bytes.begin(), bytes.end());
  }
  void say(std::span<const std::byte> bytes) {
    wire.say(bytes);
    said.insert(said.end(), bytes.begin(), bytes.end());
  }
};

std::optional<Hello> hello_of(std::span<const std::byte> bytes) {
  Hello hello;
  if (bytes.size() < sizeof(hello)) {
    return std::nullopt;
  }
  std::memcpy(&hello, bytes.data(), sizeof(hello));
  return hello;
}

tcp::Secret secret_of(const Bytes& bytes) {
  tcp::Secret secret{};
  std::ranges::copy(bytes, secret.begin());
  return secret;
}

class Stage {
 public:
  explicit Stage(Input& input) : input_(input), events_(std::make_shared<tcp::SocketEvents>(context_.get_executor())) {}
  ~Stage() {
    events_->close();
    poll();
  }

 protected:
  [[nodiscard]] tcp::LinkOptions options() const {
    tcp::LinkOptions made;
    made.incarnation = own_incarnation;
    made.hello_timeout = 10s;
    made.link.lane.drain_timeout = 10ms;
    made.link.lane.events = events_;
    made.link.lane.buffers = tcp::ReadAheadPool::create(tcp::FrameReader::read_ahead);
    return made;
  }

  /// Does what there is to do now.
  void poll() {
    context_.restart();
    context_.poll();
  }

  /// Says a hello or welcome that is right but for what the input changes, whole or in part; or anything; or goes away.
  void act(Talk& talk, Hello hello) {
    switch (input_.choice(8)) {
      case 0: talk.say(input_.bytes(input_.number())); return;
      case 1: talk.wire.close(static_cast<Wire::End>(input_.choice(3))); return;
      case 2:
      case 3: break;
      default: lie(hello); break;
    }
    // The rest of it, if a part has been said.
    const auto bytes = std::as_bytes(std::span(&hello, 1)).subspan(std::min(talk.said.size(), sizeof(hello)));
    talk.say(bytes.first(input_.flag() ? bytes.size() : std::min(bytes.size(), std::size_t{input_.number()})));
  }

  void lie(Hello& hello) {
    switch (input_.choice(6)) {
      case 0: hello.magic = input_.flag() ? std::uint64_t{Hello::dialing} : std::uint64_t{Hello::accepting}; break;
      case 1: hello.version = input_.number(); break;
      case 2: hello.lane = static_cast<std::uint32_t>(input_.any_number()); break;
      case 3: hello.lane_count = static_cast<std::uint32_t>(input_.any_number()); break;
      case 4: hello.incarnation = input_.number(); break;
      default: hello.secret[input_.choice(16)] ^= static_cast<std::byte>(input_.number()); break;
    }
  }

  void shut(Attempt& attempt) {
    if (attempt.link) {
      attempt.link->shut(errc::closed, "the input ends");
    }
  }

  Input& input_;
  asio::io_context context_;
  std::shared_ptr<tcp::SocketEvents> events_;
};

class AcceptingSide : Stage {
 public:
  explicit AcceptingSide(Input& input)
      : Stage(input),
        acceptor_(std::make_shared<tcp::DataAcceptor>(
            context_.get_executor(), options(),
            std::make_shared<kit::Refusals>(std::make_shared<kit::Logger>([](const LogRecord&) {})))) {
    acceptor_->listen("127.0.0.1", 0, 10s);
    const std::size_t count = 1 + input_.choice(3);
    for (std::size_t i = 0; i < count; ++i) {
      auto& attempt = attempts_.emplace_back();
      attempt.host = std::make_shared<Host>(i);
      attempt.endpoint =
          acceptor_->expect(attempt.host, 1 + input_.choice(3), kit::Clock::now() + 10s, attempt.handler());
    }
  }

  void run() {
    for (std::size_t i = 0; i < most_actions && !input_.empty(); ++i) {
      Attempt& attempt = attempts_[input_.choice(attempts_.size())];
      if (input_.choice(32) == 31) {
        attempt.host->abandon();
        attempt.abandoned = true;
      } else if (talks_.empty() || (talks_.size() < most_wires && input_.flag())) {
        talks_.push_back({Wire::to(acceptor_->port()), {}, {}});
      }
      Hello hello;
      hello.lane_count = static_cast<std::uint32_t>(attempt.endpoint.lanes);
      hello.lane = static_cast<std::uint32_t>(input_.choice(attempt.endpoint.lanes));
      hello.incarnation = attempt.host->peer().incarnation;
      hello.secret = secret_of(attempt.endpoint.dial_secret);
      if (!talks_.empty()) {
        act(talks_[input_.choice(talks_.size())], hello);
      }
      poll();
      check();
    }
    acceptor_->close();
    poll();
    for (auto& attempt : attempts_) {
      shut(attempt);
      require(attempt.calls <= 1 && (attempt.calls == 1 || attempt.abandoned), "an attempt ends once");
    }
    acceptor_.reset();
    poll();
  }

 private:
  static bool is_right(const Talk& talk, const Attempt& attempt, std::size_t lane) {
    const auto hello = hello_of(talk.said);
    return hello && hello->magic == Hello::dialing && hello->version == Hello().version && hello->lane == lane &&
           hello->lane_count == attempt.endpoint.lanes && hello->incarnation == attempt.host->peer().incarnation &&
           hello->secret == secret_of(attempt.endpoint.dial_secret);
  }

  void check() {
    for (auto& attempt : attempts_) {
      if (!attempt.link) {
        continue;
      }
      for (std::size_t lane = 0; lane < attempt.endpoint.lanes; ++lane) {
        require(std::ranges::any_of(talks_, [&](const Talk& talk) { return is_right(talk, attempt, lane); }),
                "each lane of a link has said the right hello");
      }
    }
    for (auto& talk : talks_) {
      talk.hear();
      const auto welcome = hello_of(talk.heard);
      if (!welcome) {
        require(talk.heard.empty(), "nobody is told a part of anything");
        continue;
      }
      require(welcome->magic == Hello::accepting && talk.heard.size() == sizeof(Hello),
              "a welcome is all that is said");
      const auto whose = std::ranges::find_if(attempts_, [&](const Attempt& attempt) {
        return attempt.link && welcome->secret == secret_of(attempt.endpoint.accept_secret);
      });
      require(whose != attempts_.end() && is_right(talk, *whose, welcome->lane),
              "who is welcomed has said the right hello");
    }
  }

  std::shared_ptr<tcp::DataAcceptor> acceptor_;
  std::deque<Attempt> attempts_;
  std::vector<Talk> talks_;
};

class DialingSide : Stage {
 public:
  explicit DialingSide(Input& input) : Stage(input) {
    attempt_.host = std::make_shared<Host>(input_.choice(2));
    attempt_.endpoint = {"127.0.0.1", listener_.port(), 1 + input_.choice(3), Bytes(16, std::byte{1}),
                         Bytes(16, std::byte{2})};
    dialer_ = std::make_shared<tcp::DataDialer>(context_.get_executor(), options(), attempt_.host, attempt_.endpoint,
                                                nullptr, attempt_.handler());
    dialer_->dial(kit::Clock::now() + 10s);
  }

  void run() {
    for (std::size_t i = 0; i < most_actions && !input_.empty() && attempt_.calls == 0; ++i) {
      poll();
      while (auto wire = listener_.accept(0)) {
        talks_.push_back({std::move(*wire), {}, {}});
      }
      poll();
      take_hellos();
      if (talks_.empty()) {
        continue;
      }
      Talk& talk = talks_[input_.choice(talks_.size())];
      Hello welcome;
      welcome.magic = Hello::accepting;
      welcome.lane_count = static_cast<std::uint32_t>(attempt_.endpoint.lanes);
      welcome.lane = hello_of(talk.heard).value_or(Hello()).lane;
      welcome.incarnation = attempt_.host->peer().incarnation;
      welcome.secret = secret_of(attempt_.endpoint.accept_secret);
      if (input_.choice(16) == 15 && again_ < 2) {
        ++again_;  // each takes its time
        welcome.magic = Hello::come_again;
        talk.say(std::as_bytes(std::span(&welcome, 1)));
        context_.restart();
        context_.run_for(25ms);
      } else {
        act(talk, welcome);
      }
      poll();
      check();
    }
    dialer_->fail(errc::closed, "the input ends");
    poll();
    shut(attempt_);
    require(attempt_.calls == 1, "an attempt ends once");
    dialer_.reset();
    poll();
  }

 private:
  void take_hellos() {
    for (auto& talk : talks_) {
      talk.hear();
      const auto hello = hello_of(talk.heard);
      require(talk.heard.empty() || (hello && talk.heard.size() == sizeof(Hello)), "a hello is all that is said");
      require(!hello || (hello->magic == Hello::dialing && hello->lane < attempt_.endpoint.lanes &&
                         hello->lane_count == attempt_.endpoint.lanes && hello->incarnation == own_incarnation &&
                         hello->secret == secret_of(attempt_.endpoint.dial_secret)),
              "a hello is right");
    }
  }

  void check() {
    for (std::size_t lane = 0; attempt_.link && lane < attempt_.endpoint.lanes; ++lane) {
      require(std::ranges::any_of(talks_,
                                  [&](const Talk& talk) {
                                    const auto hello = hello_of(talk.heard);
                                    const auto welcome = hello_of(talk.said);
                                    return hello && welcome && hello->lane == lane &&
                                           welcome->magic == Hello::accepting && welcome->version == Hello().version &&
                                           welcome->lane == lane && welcome->lane_count == attempt_.endpoint.lanes &&
                                           welcome->incarnation == attempt_.host->peer().incarnation &&
                                           welcome->secret == secret_of(attempt_.endpoint.accept_secret);
                                  }),
              "each lane of a link was welcomed rightly");
    }
  }

  LiarsListener listener_;
  Attempt attempt_;
  std::shared_ptr<tcp::DataDialer> dialer_;
  std::vector<Talk> talks_;
  int again_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::size_t before = open_descriptors().size();
  Input input(data, size);
  if (input.flag()) {
    AcceptingSide(input).run();
  } else {
    DialingSide(input).run();
  }
  require(open_descriptors().size() == before, "no connection is left over");
  return 0;
}
