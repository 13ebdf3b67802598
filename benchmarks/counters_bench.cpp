// SPDX-License-Identifier: Apache-2.0
// Measures the cost of a channel's statistics: the time that counting takes, beside that of the operations that are counted.
#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include <kvferry/kit/striped_operation.hpp>
#include <kvferry/kit/transfer_counters.hpp>
#include <kvferry/tcp/lane_traffic.hpp>

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t page_size = 4096;
constexpr std::size_t pages = 4096;

double nanoseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
}

/// The time of one operation's counting, with both readings of the clock and the bytes of two system calls, while `threads` do
/// it at once.
double counting(std::size_t threads) {
  constexpr int operations = 200'000;
  kvferry::kit::TransferCounters counters;
  kvferry::tcp::LaneTraffic lane;
  const auto count = [&counters, &lane] {
    for (int i = 0; i < operations; ++i) {
      const auto started = Clock::now();
      counters.count_start(kvferry::TransferKind::write);
      lane.sent.fetch_add(page_size, std::memory_order_relaxed);
      lane.received.fetch_add(page_size, std::memory_order_relaxed);
      counters.count_end(kvferry::TransferKind::write, {{}, 1, page_size, Clock::now() - started});
    }
  };
  const auto begin = Clock::now();
  {
    std::vector<std::jthread> others;
    for (std::size_t i = 1; i < threads; ++i) {
      others.emplace_back(count);
    }
    count();
  }
  return nanoseconds_since(begin) / operations;
}

/// The time that adding up the sizes of a batch's objects takes.
double adding_up(const std::vector<kvferry::MutableBuffer>& objects) {
  constexpr int batches = 2'000;
  std::size_t sum = 0;
  const auto begin = Clock::now();
  for (int i = 0; i < batches; ++i) {
    sum += kvferry::kit::LocalBytes(objects, {}).total();
    asm volatile("" : "+r"(sum) : : "memory");  // each batch is to be added up
  }
  return nanoseconds_since(begin) / batches;
}

class Pair {
 public:
  Pair() : initiator_(options(source_, "")), target_(options(destination_, "tcp://127.0.0.1:0")) {
    std::iota(order_.begin(), order_.end(), std::uint64_t{0});
    std::ranges::shuffle(order_, std::mt19937_64(1));
    initiator_.lazy_init_peer_connection("initiator", "target", target_.peer_init_url());
  }

  [[nodiscard]] std::vector<kvferry::MutableBuffer> objects(std::size_t count) {
    std::vector<kvferry::MutableBuffer> result;
    for (std::size_t i = 0; i < count; ++i) {
      result.emplace_back(source_.data() + order_[pages - 1 - i] * page_size, page_size);
    }
    return result;
  }

  /// The median time of a write of so many pages.
  [[nodiscard]] double writing(std::size_t count) {
    const auto writable = objects(count);
    const kvferry::ConstObjects from(std::vector<kvferry::ConstBuffer>(writable.begin(), writable.end()));
    const kvferry::TransferSpec spec{.peer_id = "target", .remote_indexes = std::span(order_).first(count)};
    std::vector<double> times;
    for (const auto begin = Clock::now(); Clock::now() - begin < std::chrono::milliseconds(300);) {
      const auto started = Clock::now();
      initiator_.batched_write(from, spec);
      times.push_back(nanoseconds_since(started));
    }
    std::ranges::nth_element(times, times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2));
    return times[times.size() / 2];
  }

 private:
  static kvferry::TcpOptions options(std::vector<std::byte>& memory, const std::string& url) {
    kvferry::TcpOptions options;
    options.regions = {{memory.data(), memory.size(), page_size}};
    options.peer_init_url = url;
    options.poll = kvferry::PollPolicy::always();
    return options;
  }

  std::vector<std::byte> source_ = std::vector<std::byte>(pages * page_size);
  std::vector<std::byte> destination_ = std::vector<std::byte>(pages * page_size);
  std::vector<std::uint64_t> order_ = std::vector<std::uint64_t>(pages);
  kvferry::TcpTransferChannel initiator_;
  kvferry::TcpTransferChannel target_;
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

void print(std::string_view what, const std::vector<double>& values) {
  const auto [least, most] = std::ranges::minmax(values);
  fmt::print("| {} | {:.1f} | {:.1f} to {:.1f} |\n", what, median(values), least, most);
}

}  // namespace

int main(int argc, char** argv) {
  std::size_t rounds = 7;
  CLI::App app(
      "Measures what a channel's statistics cost, beside the operations that they count: always polling, over "
      "loopback.");
  app.add_option("--rounds", rounds, "How often all is measured")->check(CLI::Range(1, 1000))->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  constexpr std::size_t batch = 256;
  Pair pair;
  const auto objects = pair.objects(batch);
  std::vector<double> alone;
  std::vector<double> contended;
  std::vector<double> adding;
  std::vector<double> one_page;
  std::vector<double> many_pages;
  for (std::size_t round = 0; round < rounds; ++round) {
    alone.push_back(counting(1));
    contended.push_back(counting(2));
    adding.push_back(adding_up(objects));
    one_page.push_back(pair.writing(1));
    many_pages.push_back(pair.writing(batch));
  }
  fmt::print("| ns, median of {} rounds | | from, to |\n| --- | ---: | --- |\n", rounds);
  print("counting an operation", alone);
  print("the same, while another thread does", contended);
  print("adding up the sizes of 256 objects", adding);
  print("write of one page of 4 KiB (median)", one_page);
  print("write of 256 pages of 4 KiB (median)", many_pages);
  fmt::print(
      "\nCounting takes {:.2f} % of a write of one page, {:.2f} % of one of 256 (while another thread counts).\n",
      100 * median(contended) / median(one_page), 100 * (median(contended) + median(adding)) / median(many_pages));
}
