// SPDX-License-Identifier: Apache-2.0
// A channel under attack, an honest peer beside it, and newcomers. Prints a line of figures for each attack, which
// docs/security.md quotes; verdicts are errors, memory and generous deadlines. KVFERRY_HOSTILE_SECONDS sets how long each
// attack lasts (2).
#include <gtest/gtest.h>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/kit/logger.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "common/patience.hpp"
#include "common/process_figures.hpp"
#include "hostile/attacks.hpp"

namespace kvferry::inline KVFERRY_ABI::hostile {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr std::size_t page_size = 4096;
constexpr std::size_t pages = 64;
/// How much a channel with default bounds may grow under attack; docs/security.md adds it up.
constexpr double most_growth_mib = 256;
/// For what takes milliseconds, on a machine that is busy and attacked.
constexpr std::chrono::seconds deadline{10};

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

double resident_mib() { return kvferry::testing::ProcessFigures::of().resident_mib; }

/// Runs an attack in a process that is made before any channel is, and killed with this object.
class Attacker {
 public:
  explicit Attacker(Attack attack) {
    int ends[2];
    if (::pipe(ends) != 0 || (process_ = ::fork()) == -1) {
      throw std::runtime_error("no process for the attack");
    }
    if (process_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::close(ends[1]);
      Target target;
      if (::read(ends[0], &target, sizeof(target)) == sizeof(target)) {
        for (const std::uint16_t port : {target.init_port, target.data_port}) {
          ::close(connect_to(target, port));
        }
        try {
          attack(target);
        } catch (...) {
        }
      }
      ::_exit(0);
    }
    ::close(ends[0]);
    begin_ = ends[1];
  }
  Attacker(const Attacker&) = delete;
  Attacker& operator=(const Attacker&) = delete;
  ~Attacker() {
    ::close(begin_);
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }

  void begin(const Target& target) const {
    ASSERT_EQ(::write(begin_, &target, sizeof(target)), ssize_t{sizeof(target)});
  }
  [[nodiscard]] bool goes_on() const { return ::waitpid(process_, nullptr, WNOHANG) == 0; }

 private:
  pid_t process_ = -1;
  int begin_ = -1;
};

class Hub : public TcpTransferChannel {
 public:
  using TcpTransferChannel::TcpTransferChannel;
  ~Hub() override { close(); }

  SideMessage handle_init_side_msg(const SideMessage& message) override {
    if (message.is<P2PInitSideMsg>()) {
      // As slow as a handler that asks somebody else; no longer than the channel is there.
      std::unique_lock lock(mutex_);
      closing_.wait_for(lock, 50ms, [&] { return closed_; });
    }
    return TcpTransferChannel::handle_init_side_msg(message);
  }

  void close() override {
    kit::refuse_in_log_sink("close()");
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    closing_.notify_all();
    TcpTransferChannel::close();
  }

 private:
  std::mutex mutex_;
  std::condition_variable closing_;
  bool closed_ = false;
};

/// Of what the channel logs: waits for a line that has this in it.
class Watch {
 public:
  explicit Watch(std::string_view part) : part_(part) {}
  [[nodiscard]] LogSink sink() {
    return [this](const LogRecord& record) {
      const std::lock_guard lock(mutex_);
      seen_ = seen_ || to_string(record).find(part_) != std::string::npos;
      changed_.notify_all();
    };
  }
  [[nodiscard]] bool sees_it() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kvferry_test::long_enough, [this] { return seen_; });
  }

 private:
  const std::string_view part_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool seen_ = false;
};

TcpOptions hub_options(std::vector<std::byte>& memory, Secured secured, Watch& watch) {
  TcpOptions options;
  options.log_sink = watch.sink();
  options.keyring = secured == Secured::by_nothing ? nullptr : keyring_of_hub();
  if (secured == Secured::by_certificates) {
    options.certificates = certificates().hub.files();
  }
  options.regions = {{memory.data(), memory.size(), page_size}};
  options.peer_init_url = kvferry::testing::own_loopback_url();
  options.peer_lookup_url = "tcp://127.0.0.1:1";
  return options;
}

/// Whether others than the honest peers have connected, or do so in this time.
bool has_strangers(Hub& hub, std::chrono::milliseconds time) {
  for (const auto until = Clock::now() + time;;) {
    std::error_code ec;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now());
    const PeerEvent event = hub.wait_peer_event(std::max(left, 0ms), ec);
    if (ec || (event.peer_id != "honest" && !event.peer_id.starts_with("newcomer"))) {
      return !ec;
    }
  }
}

Target target_of(const Hub& hub) {
  const std::string url = hub.peer_init_url();
  const std::size_t begin = url.rfind('/') + 1;
  const std::size_t colon = url.rfind(':');
  Target target;
  url.copy(target.host.data(), std::min(colon - begin, target.host.size() - 1), begin);
  target.init_port = static_cast<std::uint16_t>(std::stoi(url.substr(colon + 1)));
  target.data_port = hub.data_port();
  return target;
}

TcpOptions peer_options(Secured hub) {
  TcpOptions options;
  options.keyring = hub == Secured::by_nothing ? nullptr : keyring_with(keys().honest);
  if (hub == Secured::by_certificates) {
    options.certificates = certificates().honest.files();
  }
  return options;
}

struct Figures {
  std::size_t operations = 0;
  std::size_t errors = 0;
  std::string error;
  std::size_t newcomers = 0;
  std::size_t turned_away = 0;
  double slowest_newcomer = 0;
  double growth_mib = 0;
  double close_seconds = 0;
};

class Hostile : public ::testing::TestWithParam<NamedAttack> {
 protected:
  static std::chrono::duration<double> lasts() {
    const char* const given = std::getenv("KVFERRY_HOSTILE_SECONDS");
    return std::chrono::duration<double>(given == nullptr ? 2.0 : std::atof(given));
  }
};

void note(Figures& figures, std::size_t& count, std::error_code ec, const std::string& why) {
  if (ec) {
    ++count;
    figures.error = ec.message() + ": " + why;
  }
}

TEST_P(Hostile, HarmsNoHonestPeer) {
  const Secured secured = GetParam().hub;
  // The attacker's, too.
  if (secured != Secured::by_nothing) {
    (void)keys();
  }
  if (secured == Secured::by_certificates) {
    (void)certificates();
  }
  const Attacker attacker(GetParam().run);
  std::vector<std::byte> memory(pages * page_size);
  Watch watch(GetParam().noticed);
  std::optional<Hub> hub(std::in_place, hub_options(memory, secured, watch));
  const std::string url = hub->peer_init_url();
  std::vector<std::byte> object(page_size);
  TcpTransferChannel honest(peer_options(secured));
  honest.lazy_init_peer_connection("honest", "hub", url);

  Figures figures;
  const double before = resident_mib();
  attacker.begin(target_of(*hub));
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(lasts());
  std::thread newcomers([&] {
    while (Clock::now() < until) {
      TcpTransferChannel newcomer(peer_options(secured));
      std::error_code ec;
      std::string why;
      const auto began = Clock::now();
      newcomer.lazy_init_peer_connection("newcomer-" + std::to_string(figures.newcomers), "hub", url, {},
                                         {.timeout = deadline, .diagnostic = &why}, ec);
      figures.slowest_newcomer = std::max(figures.slowest_newcomer, seconds(Clock::now() - began));
      ++figures.newcomers;
      note(figures, figures.turned_away, ec, why);
    }
  });
  std::string broken;
  std::size_t failed = 0;
  bool strangers_seen = false;
  while (Clock::now() < until) {
    strangers_seen = strangers_seen || has_strangers(*hub, 0ms);
    const std::vector<std::uint64_t> page{figures.operations % (pages - 1)};
    std::error_code ec;
    std::string why;
    honest.batched_write({ConstBuffer(object.data(), object.size())},
                         {.peer_id = "hub", .remote_indexes = page, .timeout = deadline, .diagnostic = &why}, ec);
    ++figures.operations;
    if (ec) {
      ++failed;
      broken = why;
    }
    figures.growth_mib = std::max(figures.growth_mib, resident_mib() - before);
  }
  newcomers.join();
  figures.errors = failed;
  EXPECT_TRUE(attacker.goes_on());
  EXPECT_TRUE(GetParam().noticed.empty() || watch.sees_it()) << "the channel has not noticed the attack";
  EXPECT_TRUE(!GetParam().becomes_peer || strangers_seen || has_strangers(*hub, deadline))
      << "the attacker has not become a peer";
  const auto closing = Clock::now();
  hub->close();
  figures.close_seconds = seconds(Clock::now() - closing);
  hub.reset();

  std::printf("| %s | %zu | %zu | %zu | %zu | %.0f ms | %.0f MiB | %.0f ms |\n", std::string(GetParam().does).c_str(),
              figures.operations, figures.errors, figures.newcomers, figures.turned_away,
              figures.slowest_newcomer * 1e3, figures.growth_mib, figures.close_seconds * 1e3);
  EXPECT_EQ(figures.errors, 0U) << broken;
  EXPECT_EQ(figures.turned_away, 0U) << figures.error;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_LT(figures.growth_mib, most_growth_mib);
#endif
  EXPECT_LT(figures.close_seconds, seconds(deadline));
}

INSTANTIATE_TEST_SUITE_P(Attacks, Hostile, ::testing::ValuesIn(attacks().begin(), attacks().end()),
                         [](const auto& instance) { return std::string(instance.param.name); });
INSTANTIATE_TEST_SUITE_P(OnKeys, Hostile, ::testing::ValuesIn(attacks_on_keys().begin(), attacks_on_keys().end()),
                         [](const auto& instance) { return std::string(instance.param.name); });
INSTANTIATE_TEST_SUITE_P(OnCertificates, Hostile,
                         ::testing::ValuesIn(attacks_on_certificates().begin(), attacks_on_certificates().end()),
                         [](const auto& instance) { return std::string(instance.param.name); });

}  // namespace
}  // namespace kvferry::hostile
