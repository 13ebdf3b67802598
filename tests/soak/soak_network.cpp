// SPDX-License-Identifier: Apache-2.0
// A bad network between hosts that are network namespaces: each has one device, 10.79.0.1, 10.79.0.2 and so on, and every packet goes
// through this program, which loses some and delays the others, so that some overtake. For tests/soak.sh, where the kernel
// has no netem.
//
// Says on a line of its output which of its descriptors is which host's namespace, when all are there, and what it has done
// when it is asked to end (SIGTERM).
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <queue>
#include <random>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr int mtu = 9000;
/// Packets under way; as in a switch, there is no room for more.
constexpr std::size_t most_delayed = 4096;

struct Options {
  std::size_t hosts = 4;
  double loss_percent = 0.2;
  double delay_ms = 0.2;   ///< Of each packet, and up to
  double jitter_ms = 0.5;  ///< as much more.
  std::uint64_t seed = 1;
};

int checked(int result, const char* what) {
  if (result == -1) {
    throw std::system_error(errno, std::system_category(), what);
  }
  return result;
}

struct Host {
  int network = -1;  ///< Its namespace.
  int device = -1;
};

void set_address(int socket, ifreq& request, unsigned long what, const std::string& address) {
  sockaddr_in numbers{};
  numbers.sin_family = AF_INET;
  ::inet_pton(AF_INET, address.c_str(), &numbers.sin_addr);
  std::memcpy(&request.ifr_addr, &numbers, sizeof(numbers));
  checked(::ioctl(socket, what, &request), "address of a device");
}

void bring_up(int socket, const char* name) {
  ifreq request{};
  std::snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
  request.ifr_flags = IFF_UP | IFF_RUNNING;
  checked(::ioctl(socket, SIOCSIFFLAGS, &request), "bring a device up");
}

/// Leaves this thread in the new host's namespace.
Host make_host(std::size_t number) {
  checked(::unshare(CLONE_NEWNET), "new network namespace");
  Host host;
  host.network = checked(::open("/proc/self/ns/net", O_RDONLY), "network namespace");
  host.device = checked(::open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), "/dev/net/tun");
  ifreq request{};
  std::snprintf(request.ifr_name, sizeof(request.ifr_name), "soak");
  request.ifr_flags = IFF_TUN | IFF_NO_PI;
  checked(::ioctl(host.device, TUNSETIFF, &request), "network device");

  const int socket = checked(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
  set_address(socket, request, SIOCSIFADDR, "10.79.0." + std::to_string(number + 1));
  set_address(socket, request, SIOCSIFNETMASK, "255.255.255.0");
  request.ifr_mtu = mtu;
  checked(::ioctl(socket, SIOCSIFMTU, &request), "size of packets");
  bring_up(socket, "soak");
  bring_up(socket, "lo");
  ::close(socket);
  return host;
}

class Network {
 public:
  explicit Network(const Options& options)
      : options_(options), random_(options.seed), lost_(options.loss_percent / 100), jitter_(0, options.jitter_ms) {
    for (std::size_t i = 0; i < options.hosts; ++i) {
      hosts_.push_back(make_host(i));
    }
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGTERM);
    checked(::sigprocmask(SIG_BLOCK, &ending, nullptr), "signals");
    end_ = checked(::signalfd(-1, &ending, SFD_CLOEXEC), "signals");
  }

  void say_where() const {
    for (const Host& host : hosts_) {
      std::cout << host.network << ' ';
    }
    std::cout << std::endl;
  }

  void run() {
    std::vector<pollfd> polled;
    for (const Host& host : hosts_) {
      polled.push_back({host.device, POLLIN, 0});
    }
    polled.push_back({end_, POLLIN, 0});
    while (polled.back().revents == 0) {
      const auto wait = deliver();
      if (::ppoll(polled.data(), polled.size(), wait.tv_sec == -1 ? nullptr : &wait, nullptr) > 0) {
        for (const Host& host : hosts_) {
          take(host);
        }
      }
    }
  }

  void say_what() const { std::cout << passed_ << ' ' << dropped_ << ' ' << crowded_ << std::endl; }

 private:
  struct Packet {
    Clock::time_point due;
    std::uint64_t number = 0;
    int to = -1;
    std::vector<char> bytes;
    bool operator<(const Packet& other) const {
      return std::tie(other.due, other.number) < std::tie(due, number);  // the earliest is on top
    }
  };

  /// Hands over what is due. @return how long until the next is; -1 s: there is none.
  timespec deliver() {
    while (!under_way_.empty()) {
      const auto left = std::chrono::nanoseconds(under_way_.top().due - Clock::now()).count();
      if (left > 0) {
        return {left / 1'000'000'000, left % 1'000'000'000};
      }
      const Packet& packet = under_way_.top();
      // A host whose queue is full loses it.
      passed_ += ::write(packet.to, packet.bytes.data(), packet.bytes.size()) == -1 ? 0U : 1U;
      under_way_.pop();
    }
    return {-1, 0};
  }

  void take(const Host& from) {
    std::vector<char> bytes(mtu);
    for (int i = 0; i < 64; ++i) {
      const ssize_t size = ::read(from.device, bytes.data(), bytes.size());
      if (size < static_cast<ssize_t>(header_bytes)) {
        return;
      }
      if ((bytes[0] & 0xF0) != 0x40) {
        continue;  // IPv6's own words
      }
      const auto to = static_cast<unsigned char>(bytes[header_bytes - 1]);
      if (to == 0 || to > hosts_.size()) {
        continue;
      }
      if (lost_(random_)) {
        ++dropped_;
      } else if (under_way_.size() == most_delayed) {
        ++crowded_;
      } else {
        const std::chrono::duration<double, std::milli> delay(options_.delay_ms + jitter_(random_));
        under_way_.push({Clock::now() + std::chrono::duration_cast<Clock::duration>(delay),
                         ++number_,
                         hosts_[to - 1U].device,
                         {bytes.begin(), bytes.begin() + size}});
      }
    }
  }

  static constexpr std::size_t header_bytes = 20;  ///< Of IPv4; the receiver's address is at its end.

  const Options options_;
  std::mt19937_64 random_;
  std::bernoulli_distribution lost_;
  std::uniform_real_distribution<double> jitter_;
  std::vector<Host> hosts_;
  int end_ = -1;
  std::priority_queue<Packet> under_way_;
  std::uint64_t number_ = 0;
  std::uint64_t passed_ = 0;
  std::uint64_t dropped_ = 0;
  std::uint64_t crowded_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("The network of tests/soak.sh");
  app.add_option("--hosts", options.hosts, "Hosts, each a network namespace")->check(CLI::Range(1, 250));
  app.add_option("--loss", options.loss_percent, "Per cent of packets that get lost")->check(CLI::Range(0.0, 100.0));
  app.add_option("--delay", options.delay_ms, "Milliseconds that each packet takes");
  app.add_option("--jitter", options.jitter_ms, "Milliseconds that it takes longer, at most");
  app.add_option("--seed", options.seed, "Of what is done at random");
  CLI11_PARSE(app, argc, argv);
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  try {
    Network network(options);
    network.say_where();
    network.run();
    network.say_what();
  } catch (const std::exception& error) {
    std::cerr << "no network: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
