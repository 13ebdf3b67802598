// SPDX-License-Identifier: Apache-2.0
// One channel and very many peers of it over TCP, on loopback: how fast they come in, what each costs, how much they move in
// all, how a small write fares beside a large one, and what all of them cost while nothing happens. Over RDMA: how fast they
// come in, what each costs, and that each one's bytes are moved.
#include <sys/resource.h>

#include <fmt/core.h>
#include <CLI/CLI.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <latch>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include "scale/hub.hpp"
#include "scale/many_sockets.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr std::size_t page_size = std::size_t{64} << 10;
constexpr std::size_t pages_in_batch = 16;
constexpr std::chrono::seconds patience{120};

double seconds_since(Clock::time_point begin) { return Seconds(Clock::now() - begin).count(); }

double quantile(std::vector<double>& values, double q) {
  std::ranges::sort(values);
  return values[std::min(static_cast<std::size_t>(q * static_cast<double>(values.size())), values.size() - 1)];
}

/// Runs all peers' I/O, and the handlers that start the next batches. Threads of each peer's own would take turns on
/// the machine's cores, and that is what would be measured.
class SharedThreads {
 public:
  explicit SharedThreads(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      threads_.emplace_back([this] { context_.run(); });
    }
  }
  SharedThreads(const SharedThreads&) = delete;
  SharedThreads& operator=(const SharedThreads&) = delete;
  ~SharedThreads() { context_.stop(); }

  [[nodiscard]] asio::any_io_executor executor() { return context_.get_executor(); }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_ = asio::make_work_guard(context_);
  std::vector<std::jthread> threads_;
};

kvferry::ChannelOptions options_of_peer(std::vector<std::byte>& memory, std::size_t page, SharedThreads& threads) {
  kvferry::ChannelOptions options = bench::options_of(memory, page);
  options.executor = threads.executor();
  return options;
}

class Peer {
 public:
  /// @param memory of all peers: a thousand peers' own would not be in any cache of this machine, and on other machines they
  ///   would have one each.
  Peer(bench::Transport transport, std::size_t number, std::vector<std::byte>& memory, std::size_t page,
       SharedThreads& threads)
      : number_(number),
        memory_(memory),
        channel_(bench::make_channel(transport, options_of_peer(memory, page, threads))) {}

  void connect(const bench::Hub& hub) {
    channel_->lazy_init_peer_connection("peer-" + std::to_string(number_), "hub", hub.url(), {}, {.timeout = patience});
  }

  void write(std::size_t bytes, std::size_t pages) {
    const std::vector<kvferry::ConstBuffer> objects(pages, {memory_.data(), bytes});
    std::vector<std::uint64_t> indexes(pages);
    std::iota(indexes.begin(), indexes.end(), std::uint64_t{0});
    channel_->batched_write(objects, {.peer_id = "hub", .remote_indexes = indexes, .timeout = patience});
  }

  /// Writes something to a page of the hub that no other peer uses, and reads it back. Its memory has two pages for that.
  /// @throws std::runtime_error if other bytes come back.
  void check(std::size_t page) {
    const std::span<std::byte> written = std::span(memory_).first(page);
    const std::span<std::byte> read = std::span(memory_).subspan(page, page);
    std::mt19937_64 random(number_);
    for (std::size_t i = 0; i < page; ++i) {
      written[i] = static_cast<std::byte>(random());
    }
    const std::vector<std::uint64_t> index{number_};
    const std::vector<kvferry::ConstBuffer> from{written};
    const std::vector<kvferry::MutableBuffer> into{read};
    channel_->batched_write(from, {.peer_id = "hub", .remote_indexes = index, .timeout = patience});
    channel_->batched_read(into, {.peer_id = "hub", .remote_indexes = index, .timeout = patience});
    if (!std::ranges::equal(written, read)) {
      throw std::runtime_error("the hub's page has other bytes than were written");
    }
  }

  /// Writes batches one after the other, on the shared threads.
  /// @param goes_on is called after each batch; it calls nothing of this once it has returned false, or `failed` is called.
  template <class GoesOn, class Failed>
  void keep_writing(GoesOn goes_on, Failed failed) {
    const std::vector<kvferry::ConstBuffer> objects(pages_in_batch, {memory_.data(), page_size});
    std::array<std::uint64_t, pages_in_batch> indexes{};
    std::iota(indexes.begin(), indexes.end(), std::uint64_t{0});
    channel_->async_batched_write(objects, {.peer_id = "hub", .remote_indexes = indexes, .timeout = patience},
                                  [this, goes_on, failed](std::error_code ec, std::size_t /*written*/) {
                                    if (ec) {
                                      failed(ec);
                                    } else if (goes_on()) {
                                      keep_writing(goes_on, failed);
                                    }
                                  });
  }

 private:
  std::size_t number_;
  std::vector<std::byte>& memory_;
  std::unique_ptr<kvferry::BaseTransferChannel> channel_;
};

/// Runs `work(i)` for each i on a thread of its own, all at once. @return how long it took until the last one was done.
template <class Work>
double all_at_once(std::size_t count, Work work) {
  std::barrier start(static_cast<std::ptrdiff_t>(count + 1));
  std::atomic<std::size_t> failed{0};
  std::vector<std::jthread> threads;
  for (std::size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      start.arrive_and_wait();
      try {
        work(i);
      } catch (const std::exception& error) {
        if (failed++ == 0) {
          fmt::print(stderr, "peer {}: {}\n", i, error.what());
        }
      }
    });
  }
  start.arrive_and_wait();
  const auto begin = Clock::now();
  threads.clear();
  const double took = seconds_since(begin);
  if (failed != 0) {
    throw std::runtime_error(std::to_string(failed) + " of " + std::to_string(count) + " failed");
  }
  return took;
}

/// All peers write at once. @return how many batches a second.
double batches_per_second(std::vector<std::unique_ptr<Peer>>& peers, std::chrono::milliseconds time) {
  std::atomic<std::uint64_t> batches{0};
  std::atomic<int> error{0};
  std::latch ended(static_cast<std::ptrdiff_t>(peers.size()));
  const auto begin = Clock::now();
  for (const auto& peer : peers) {
    peer->keep_writing(
        [&, until = begin + time] {
          ++batches;
          const bool goes_on = Clock::now() < until;
          if (!goes_on) {
            ended.count_down();
          }
          return goes_on;
        },
        [&](std::error_code ec) {
          error = ec.value();
          fmt::print(stderr, "a write: {}\n", ec.message());
          ended.count_down();
        });
  }
  ended.wait();
  if (error != 0) {
    throw std::runtime_error("a peer could not write");
  }
  return static_cast<double>(batches) / seconds_since(begin);
}

/// CPU time of this process, which holds all peers.
double own_cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

/// The part of a CPU that the hub takes while nothing happens.
double idle_share(const bench::Hub& hub, const bench::ProcessUsage& resting, std::chrono::milliseconds time) {
  std::this_thread::sleep_for(time);  // nothing happens: that is what is measured
  return (hub.usage().cpu_seconds - resting.cpu_seconds) / Seconds(time).count();
}

void measure_peers(std::size_t count, std::size_t peer_threads, std::chrono::milliseconds time) {
  std::vector<std::byte> memory(pages_in_batch * page_size, std::byte{1});
  bench::ManySockets sockets(count, memory);  // forks, as the hub does
  const bench::Hub hub(bench::Transport::tcp, pages_in_batch,
                       page_size);  // has copies of the sockets, so it has to end before them
  constexpr double gigabytes_in_batch = static_cast<double>(pages_in_batch * page_size) / 1e9;
  (void)sockets.batches_per_second(time / 4);  // buffers grow
  const double sockets_before = sockets.batches_per_second(time / 2) * gigabytes_in_batch;
  SharedThreads threads(peer_threads);
  std::vector<std::unique_ptr<Peer>> peers;
  for (std::size_t i = 0; i < count; ++i) {
    peers.push_back(std::make_unique<Peer>(bench::Transport::tcp, i, memory, page_size, threads));
  }
  const bench::ProcessUsage before = hub.usage();
  const double connecting = all_at_once(count, [&](std::size_t i) { peers[i]->connect(hub); });
  const bench::ProcessUsage connected = hub.usage();

  (void)batches_per_second(peers, time / 4);  // sockets' buffers grow
  const bench::ProcessUsage quiet = hub.usage();
  const double quiet_peers = own_cpu_seconds();
  const auto moving = Clock::now();
  const double rate = batches_per_second(peers, time) * gigabytes_in_batch;
  const double moved = rate * seconds_since(moving);
  const double peers_seconds = (own_cpu_seconds() - quiet_peers) / moved;
  const double hub_seconds = (hub.usage().cpu_seconds - quiet.cpu_seconds) / moved;
  const double of_sockets = (sockets_before + sockets.batches_per_second(time / 2) * gigabytes_in_batch) / 2;

  // One peer's small writes, while another one writes as much as it can.
  std::string beside = "-";
  if (count > 1) {
    std::atomic<bool> enough{false};
    std::jthread bulk([&] {
      while (!enough) {
        peers[1]->write(page_size, pages_in_batch);
      }
    });
    std::vector<double> took;
    for (const auto end = Clock::now() + time; Clock::now() < end;) {
      const auto begin = Clock::now();
      peers[0]->write(4096, 1);
      took.push_back(seconds_since(begin) * 1e3);
    }
    enough = true;
    beside = fmt::format("{:.2f}, {:.2f}", quantile(took, 0.5), quantile(took, 0.99));
  }

  const bench::ProcessUsage resting = hub.usage();
  const double idle = idle_share(hub, resting, time);
  const auto peers_of = static_cast<double>(count);
  fmt::print("| {} | {:.0f} | {:.1f} | {:.1f} | {:.2f} | {:.2f} | {:.2f} | {:.3f} | {:.3f} | {} | {:.1f} |\n", count,
             peers_of / connecting, (connected.resident_kib - before.resident_kib) / peers_of,
             (connected.descriptors - before.descriptors) / peers_of, rate, of_sockets, rate / of_sockets, hub_seconds,
             peers_seconds, beside, idle * 100);
  std::fflush(stdout);
}

/// Over RDMA: what a peer costs the hub once it has moved bytes, which are compared.
void measure_rdma_peers(std::size_t count, std::size_t peer_threads, std::chrono::milliseconds time) {
  constexpr std::size_t page = 4096;
  const bench::Hub hub(bench::Transport::rdma, count, page);
  SharedThreads threads(peer_threads);
  std::vector<std::vector<std::byte>> memory(count, std::vector<std::byte>(2 * page));
  std::vector<std::unique_ptr<Peer>> peers;
  for (std::size_t i = 0; i < count; ++i) {
    peers.push_back(std::make_unique<Peer>(bench::Transport::rdma, i, memory[i], page, threads));
  }
  const bench::ProcessUsage before = hub.usage();
  const double connecting = all_at_once(count, [&](std::size_t i) { peers[i]->connect(hub); });
  const double checking = all_at_once(count, [&](std::size_t i) { peers[i]->check(page); });
  const bench::ProcessUsage resting = hub.usage();
  const double idle = idle_share(hub, resting, time);
  const auto peers_of = static_cast<double>(count);
  fmt::print("| {} | {:.0f} | {:.1f} | {:.1f} | {:.1f} | {:.0f}, {:.0f} | {:.0f} | {:.1f} |\n", count,
             peers_of / connecting, (resting.pinned_kib - before.pinned_kib) / peers_of,
             (resting.resident_kib - before.resident_kib) / peers_of,
             (resting.descriptors - before.descriptors) / peers_of, before.threads, resting.threads,
             peers_of / checking, idle * 100);
  std::fflush(stdout);
}

void measure_batches(std::size_t most, std::chrono::milliseconds time) {
  constexpr std::size_t page = 512;
  fmt::print("\n| pages of {} bytes in a batch | us a batch (median) | ns a page | GB/s |\n| ---: | ---: | ---: | ---: |\n", page);
  const bench::Hub hub(bench::Transport::tcp, most, page);
  std::vector<std::byte> memory(most * page, std::byte{1});
  const auto channel = bench::make_channel(bench::Transport::tcp, bench::options_of(memory, page));
  channel->lazy_init_peer_connection("peer", "hub", hub.url());
  for (std::size_t count = 1; count <= most; count *= 10) {
    std::vector<kvferry::ConstBuffer> objects;
    std::vector<std::uint64_t> indexes;
    for (std::size_t i = 0; i < count; ++i) {
      objects.emplace_back(memory.data() + i * page, page);
      indexes.push_back(count - 1 - i);  // no two of them side by side
    }
    std::vector<double> took;
    for (const auto end = Clock::now() + time; took.empty() || Clock::now() < end;) {
      const auto begin = Clock::now();
      channel->batched_write(objects, {.peer_id = "hub", .remote_indexes = indexes, .timeout = patience});
      took.push_back(seconds_since(begin) * 1e6);
    }
    const double median = quantile(took, 0.5);
    fmt::print("| {} | {:.1f} | {:.0f} | {:.2f} |\n", count, median, median * 1e3 / static_cast<double>(count),
               static_cast<double>(count * page) / median / 1e3);
    std::fflush(stdout);
  }
}

/// Peers of one process take some twenty descriptors each.
void raise_descriptor_limit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::size_t> peers{1, 10, 100, 1000};
  std::size_t peer_threads = 1;
  std::size_t pages = 1'000'000;
  int milliseconds = 1000;
  auto transport = bench::Transport::tcp;
  CLI::App app(
      "Measures one channel with very many peers over TCP, on loopback, and batches of very many pages; or with very "
      "many "
      "peers over RDMA.");
  app.add_option("--transport", transport, "What carries the pages: tcp, rdma")
      ->transform(CLI::Transformer(
          std::map<std::string, bench::Transport>{{"tcp", bench::Transport::tcp}, {"rdma", bench::Transport::rdma}}));
  app.add_option("--peers", peers, "How many peers; several, separated by commas")->delimiter(',')->capture_default_str();
  app.add_option("--peer-threads", peer_threads, "Threads that all peers share")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--pages", pages, "The most pages of a batch (tcp)")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
      ->capture_default_str();
  app.add_option("--time", milliseconds, "Milliseconds that each measurement takes")
      ->check(CLI::Range(1, 600'000))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    raise_descriptor_limit();
    const std::chrono::milliseconds time(milliseconds);
    if (transport == bench::Transport::rdma) {
      fmt::print(
          "| peers | handshakes/s, all at once | pinned KiB a peer | resident KiB a peer | descriptors a peer | hub's "
          "threads, before and after | pages written, read back and compared/s, all at once | idle, % of a CPU |\n"
          "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
      std::fflush(stdout);
      for (const std::size_t count : peers) {
        measure_rdma_peers(count, peer_threads, time);
      }
      return 0;
    }
    fmt::print(
        "| peers | handshakes/s, all at once | KiB a peer | descriptors a peer | GB/s in all | plain sockets | ratio | "
        "hub's CPU, s a GB | peers' CPU, s a GB | 4 KiB write beside a large one, ms (median, 99 %) | idle, % of a CPU "
        "|\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    std::fflush(stdout);
    for (const std::size_t count : peers) {
      measure_peers(count, peer_threads, time);
    }
    measure_batches(pages, time);
  } catch (const std::exception& error) {
    fmt::print(stderr, "scale_bench: {}\n", error.what());
    return 1;
  }
}
