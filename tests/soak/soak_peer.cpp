// SPDX-License-Identifier: Apache-2.0
// One of several processes that write, read, send and notify each other at random while soak.py kills, stops and restarts them.
// Each process owns a part of every other's pages, remembers what it has written there, and checks every byte that it reads back.
// Writes its figures as JSON, once a second and at the end.
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/log.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr std::size_t page_size = 16 * 1024;
constexpr std::size_t pages_each = 64;  ///< That each peer owns of each process's region.
constexpr std::size_t largest_batch = 24;
/// Objects of a send or recv, and its tag: few, so that many meet.
constexpr std::array<std::size_t, 3> paired_batches{1, 7, largest_batch};

struct Options {
  std::size_t self = 0;
  std::vector<std::string> urls;  ///< Of all, this one's included.
  double seconds = 60;
  std::uint64_t seed = 1;
  std::size_t lanes = 1;
  std::string report;
};

std::atomic<bool> stopping{false};

/// A page's content names who wrote it, and when; every byte follows from that.
struct Stamp {
  std::uint64_t writer = 0;
  std::uint64_t serial = 0;
  std::uint64_t page = 0;
  bool operator==(const Stamp&) const = default;
};

void stamp(std::span<std::byte> page, const Stamp& by) {
  std::uint64_t word =
      by.writer * 0x9e3779b97f4a7c15U ^ by.serial * 0xbf58476d1ce4e5b9U ^ by.page * 0x94d049bb133111ebU;
  std::memcpy(page.data(), &by, sizeof(by));
  for (std::size_t at = sizeof(by); at < page.size(); at += sizeof(word)) {
    word = word * 6364136223846793005U + 1442695040888963407U;
    std::memcpy(page.data() + at, &word, std::min(sizeof(word), page.size() - at));
  }
}

Stamp stamp_of(std::span<const std::byte> page) {
  Stamp by;
  std::memcpy(&by, page.data(), sizeof(by));
  return by;
}

/// Bytes that are not what `expected` wrote.
std::uint64_t wrong_bytes(std::span<const std::byte> page, const Stamp& expected) {
  std::vector<std::byte> right(page.size());
  stamp(right, expected);
  return static_cast<std::uint64_t>(std::inner_product(page.begin(), page.end(), right.begin(), std::ptrdiff_t{0},
                                                       std::plus<>(),
                                                       [](std::byte a, std::byte b) { return a == b ? 0 : 1; }));
}

class Figures {
 public:
  void operation(std::string_view kind, const std::error_code& ec, std::uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    ++(ec ? failed_[std::string(kind) + " " + kvferry::error_name(ec)] : succeeded_[std::string(kind)]);
    bytes_ += bytes;
    // All that kills, stops and a lossy network can do to a call.
    const bool known = !ec || ec == kvferry::condition::peer_failed || ec == kvferry::condition::retryable ||
                       ec == kvferry::condition::timed_out || ec == kvferry::condition::cancelled;
    unexpected_ += known ? 0 : 1;
  }

  void logged(const kvferry::LogRecord& record) {
    const std::lock_guard lock(mutex_);
    logged_[std::string(record.event)] += 1 + record.suppressed;
  }

  void checked(std::uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    checked_ += bytes;
  }

  void corrupt(std::uint64_t bytes, const std::string& what) {
    const std::lock_guard lock(mutex_);
    corrupt_ += bytes;
    std::cerr << what << ": " << bytes << " wrong bytes\n";
  }

  [[nodiscard]] bool good() const {
    const std::lock_guard lock(mutex_);
    return corrupt_ == 0 && unexpected_ == 0;
  }

  [[nodiscard]] nlohmann::json report() const {
    const std::lock_guard lock(mutex_);
    return {{"succeeded", succeeded_},
            {"failed", failed_},
            {"logged", logged_},
            {"bytes", bytes_},
            {"checked_bytes", checked_},
            {"corrupt_bytes", corrupt_},
            {"unexpected_errors", unexpected_}};
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::uint64_t> succeeded_;
  std::map<std::string, std::uint64_t> failed_;
  std::map<std::string, std::uint64_t> logged_;  ///< Warnings and errors.
  std::uint64_t bytes_ = 0;
  std::uint64_t checked_ = 0;
  std::uint64_t corrupt_ = 0;
  std::uint64_t unexpected_ = 0;
};

std::string id_of(std::size_t peer) { return "soak-" + std::to_string(peer); }

/// This process's dealings with one other: its pages there, and the sends to it.
class Dealings {
 public:
  Dealings(kvferry::BaseTransferChannel& channel, Figures& figures, const Options& options, std::size_t peer)
      : channel_(channel),
        figures_(figures),
        self_(options.self),
        id_(id_of(peer)),
        url_(options.urls[peer]),
        random_(options.seed * 1009 + options.self * 31 + peer),
        memory_(largest_batch * page_size),
        serial_(static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())) {}

  void run() {
    while (!stopping) {
      if (!connect()) {
        continue;  // a peer that this channel has never met is unknown to it
      }
      switch (random_() % 8) {
        case 0:
        case 1:
        case 2: write(std::nullopt, false); break;
        case 3: write(std::chrono::milliseconds(random_() % 20), false); break;
        case 4: write(std::nullopt, true); break;
        case 5: send(); break;
        default: read(); break;
      }
    }
  }

 private:
  [[nodiscard]] bool connect() {
    if (channel_.remote_xfer_handler_exists(id_)) {
      return true;
    }
    std::error_code ec;
    (void)channel_.lazy_init_peer_connection(id_of(self_), id_, url_, {}, {.timeout = 2s}, ec);
    figures_.operation("connect", ec, 0);
    if (!ec) {
      known_.clear();  // perhaps another incarnation, whose pages are empty
    }
    return !ec;
  }

  std::vector<std::uint64_t> some_pages() { return some_pages(1 + random_() % largest_batch); }

  std::vector<std::uint64_t> some_pages(std::size_t count) {
    std::vector<std::uint64_t> pages(pages_each);
    std::iota(pages.begin(), pages.end(), self_ * pages_each);
    std::ranges::shuffle(pages, random_);
    pages.resize(count);
    return pages;
  }

  [[nodiscard]] std::span<std::byte> buffer(std::size_t index) {
    return std::span(memory_).subspan(index * page_size, page_size);
  }

  /// @return the batch's buffers, stamped as one with a new serial.
  template <class Objects>
  Objects stamped(const std::vector<std::uint64_t>& pages) {
    ++serial_;
    std::vector<kvferry::ConstBuffer> objects;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      stamp(buffer(i), {self_, serial_, pages[i]});
      objects.emplace_back(buffer(i));
    }
    return objects;
  }

  void write(std::optional<std::chrono::milliseconds> timeout, bool cancel) {
    const auto pages = some_pages();
    const auto objects = stamped<kvferry::ConstObjects>(pages);
    kvferry::TransferSpec spec{.peer_id = id_, .remote_indexes = pages, .timeout = timeout.value_or(3s)};
    if (random_() % 4 == 0) {
      spec.notification = std::as_bytes(std::span(&serial_, 1));
    }
    for (const auto page : pages) {
      known_.erase(page);  // unspecified until this has succeeded
    }
    std::error_code ec;
    if (cancel) {
      ec = cancelled_write(objects, spec);
    } else {
      (void)channel_.batched_write(objects, spec, ec);
    }
    figures_.operation("write", ec, ec ? 0 : pages.size() * page_size);
    if (!ec) {
      for (const auto page : pages) {
        known_[page] = {self_, serial_, page};
      }
    } else if (ec == kvferry::errc::peer_restarted || ec == kvferry::errc::peer_restarted_in_flight) {
      known_.clear();
    }
    // The write has ended: its buffers are ours again, and nothing of what comes into them now may reach the peer.
    std::ranges::fill(memory_, std::byte{0xee});
  }

  std::error_code cancelled_write(const kvferry::ConstObjects& objects, const kvferry::TransferSpec& spec) {
    asio::io_context context;
    asio::cancellation_signal signal;
    std::error_code outcome;
    channel_.async_batched_write(
        objects, spec,
        asio::bind_executor(context, asio::bind_cancellation_slot(
                                         signal.slot(), [&](std::error_code ec, std::size_t) { outcome = ec; })));
    if (random_() % 2 == 0) {
      std::this_thread::yield();
    }
    signal.emit(asio::cancellation_type::terminal);
    context.run();
    return outcome;
  }

  void read() {
    const auto pages = some_pages();
    std::vector<kvferry::MutableBuffer> objects;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      objects.emplace_back(buffer(i));
    }
    std::error_code ec;
    (void)channel_.batched_read(objects, {.peer_id = id_, .remote_indexes = pages, .timeout = 3s}, ec);
    figures_.operation("read", ec, ec ? 0 : pages.size() * page_size);
    if (ec == kvferry::errc::peer_restarted) {
      known_.clear();
    }
    for (std::size_t i = 0; i < pages.size() && !ec; ++i) {
      const auto known = known_.find(pages[i]);
      if (known == known_.end()) {
        continue;
      }
      figures_.checked(page_size);
      if (const auto wrong = wrong_bytes(buffer(i), known->second)) {
        const auto found = stamp_of(buffer(i));
        figures_.corrupt(wrong, "page " + std::to_string(pages[i]) + " of " + id_ + ": serial " +
                                    std::to_string(found.serial) + " of writer " + std::to_string(found.writer) +
                                    " instead of " + std::to_string(known->second.serial));
      }
    }
  }

  void send() {
    const auto pages = some_pages(paired_batches[random_() % paired_batches.size()]);
    std::error_code ec;
    (void)channel_.batched_send(stamped<kvferry::ConstObjects>(pages),
                                {.peer_id = id_, .tag = pages.size(), .timeout = 500ms}, ec);
    figures_.operation("send", ec, ec ? 0 : pages.size() * page_size);
  }

  kvferry::BaseTransferChannel& channel_;
  Figures& figures_;
  const std::size_t self_;
  const std::string id_;
  const std::string url_;
  std::mt19937_64 random_;
  std::vector<std::byte> memory_;
  std::uint64_t serial_;                  ///< Rises, also from one start of this process to the next.
  std::map<std::uint64_t, Stamp> known_;  ///< What is in this process's pages there, where that is known.
};

/// Takes what one peer sends: each batch must be whole, of one serial, and later than the one before.
void receive_sends(kvferry::BaseTransferChannel& channel, Figures& figures, std::size_t peer, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> memory(largest_batch * page_size);
  while (!stopping) {
    const std::size_t count = paired_batches[random() % paired_batches.size()];
    std::vector<kvferry::MutableBuffer> objects;
    for (std::size_t i = 0; i < count; ++i) {
      objects.emplace_back(memory.data() + i * page_size, page_size);
    }
    std::error_code ec;
    (void)channel.batched_recv(objects, {.peer_id = id_of(peer), .tag = count, .timeout = 200ms}, ec);
    if (ec == kvferry::errc::unknown_peer) {
      std::error_code ignored;
      (void)channel.receive_notification(50ms, ignored);  // nobody is there yet
      continue;
    }
    figures.operation("recv", ec, 0);
    for (std::size_t i = 0; i < count && !ec; ++i) {
      const auto found = stamp_of(objects[i]);
      figures.checked(page_size);
      Stamp expected = stamp_of(objects[0]);
      expected.writer = peer;
      expected.page = found.page;
      if (const auto wrong = wrong_bytes(objects[i], expected)) {
        figures.corrupt(wrong, "object " + std::to_string(i) + " of a recv from " + id_of(peer));
      }
    }
  }
}

/// A peer's notifications come in the order of its writes.
void receive_notifications(kvferry::BaseTransferChannel& channel, Figures& figures) {
  std::map<std::string, std::uint64_t> last;
  while (!stopping) {
    std::error_code ec;
    const auto notification = channel.receive_notification(200ms, ec);
    if (ec) {
      continue;
    }
    std::uint64_t serial = 0;
    if (notification.payload.size() == sizeof(serial)) {
      std::memcpy(&serial, notification.payload.data(), sizeof(serial));
    }
    if (serial <= last[notification.peer_id]) {
      figures.corrupt(sizeof(serial), "notification " + std::to_string(serial) + " of " + notification.peer_id +
                                          " after " + std::to_string(last[notification.peer_id]));
    }
    last[notification.peer_id] = serial;
    figures.operation("notification", {}, 0);
  }
}

void write_report(const Figures& figures, const std::string& path) {
  const std::string unfinished = path + ".part";
  std::ofstream(unfinished) << figures.report().dump(2) << '\n';
  std::filesystem::rename(unfinished, path);
}

Options parse(int argc, char** argv) {
  Options options;
  CLI::App app("A process of tests/soak.sh");
  app.add_option("--self", options.self, "Which of the urls is this process's")->required();
  app.add_option("--urls", options.urls, "Init urls of all processes")->required();
  app.add_option("--seconds", options.seconds, "Ends after this long, if no SIGTERM comes first");
  app.add_option("--seed", options.seed, "Of what is done at random");
  app.add_option("--lanes", options.lanes, "Data connections to each peer");
  app.add_option("--report", options.report, "File for the figures")->required();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::exit(app.exit(error));
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  sigset_t ending;
  sigemptyset(&ending);
  sigaddset(&ending, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &ending, nullptr);

  Figures figures;
  kvferry::set_log_sink([&figures](const kvferry::LogRecord& record) { figures.logged(record); },
                        kvferry::LogLevel::warning);
  std::vector<std::byte> region(options.urls.size() * pages_each * page_size);
  kvferry::TcpOptions channel_options;
  channel_options.regions = {{region.data(), region.size(), page_size}};
  channel_options.peer_init_url = options.urls[options.self];
  channel_options.lanes_per_peer = options.lanes;
  channel_options.stripe_threshold = 4 * page_size;
  kvferry::TcpTransferChannel channel(channel_options);

  std::vector<std::thread> threads;
  for (std::size_t peer = 0; peer < options.urls.size(); ++peer) {
    if (peer != options.self) {
      threads.emplace_back([&, peer] { Dealings(channel, figures, options, peer).run(); });
      threads.emplace_back([&, peer] { receive_sends(channel, figures, peer, options.seed + peer); });
    }
  }
  threads.emplace_back([&] { receive_notifications(channel, figures); });

  const auto end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(options.seconds));
  const timespec second{1, 0};
  while (Clock::now() < end && ::sigtimedwait(&ending, nullptr, &second) < 0) {
    write_report(figures, options.report);
  }
  stopping = true;
  for (auto& thread : threads) {
    thread.join();
  }
  write_report(figures, options.report);
  channel.close();
  kvferry::set_log_sink({});
  return figures.good() ? 0 : 1;
}
