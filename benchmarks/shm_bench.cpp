// SPDX-License-Identifier: Apache-2.0
// Two processes of one host: batches of scattered pages between memory that kvferry allocated, and between memory that it didn't, beside
// what one copy costs: by the CPU into memory that both map, and by the kernel from process to process.
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/core.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#ifdef KVFERRY_BENCH_WITH_UCX
#include "peers/ucx_neighbours.hpp"
#endif

namespace {

using Clock = std::chrono::steady_clock;
using kvferry::TransferKind;

struct Cell {
  std::size_t page = 0;
  std::size_t batch = 0;

  [[nodiscard]] std::string name() const {
    return page < (std::size_t{1} << 20) ? fmt::format("{}Kx{}", page >> 10, batch)
                                         : fmt::format("{}Mx{}", page >> 20, batch);
  }
};

constexpr std::array<Cell, 6> cells{{{std::size_t{4} << 10, 256},
                                     {std::size_t{16} << 10, 64},
                                     {std::size_t{64} << 10, 64},
                                     {std::size_t{256} << 10, 64},
                                     {std::size_t{1} << 20, 16},
                                     {std::size_t{4} << 20, 16}}};
constexpr std::size_t latency_page = std::size_t{4} << 10;

struct Settings {
  std::size_t rounds = 7;
  std::size_t milliseconds = 40;  ///< Of each way of each cell in each round.
  std::size_t mebibytes = 256;    ///< Of each memory of each side.
  std::size_t latency_samples = 2000;
  bool huge_pages = false;
  bool rings = false;
  std::vector<std::string> only;  ///< Names of cells; empty: all, and single pages.
};

/// Anonymous memory, all of which is there. Shared with child processes, or a copy of its own in each.
std::span<std::byte> anonymous(std::size_t size, int sharing) {
  void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::system_error(errno, std::system_category(), "mmap");
  }
  return {static_cast<std::byte*>(memory), size};
}

/// Picks a batch's pages: all in turn, in a random order.
class PageOrder {
 public:
  PageOrder(std::size_t bytes, const Cell& cell, unsigned seed) : pages_(bytes / cell.page), batch_(cell.batch) {
    std::iota(pages_.begin(), pages_.end(), 0);
    std::ranges::shuffle(pages_, std::mt19937(seed));
  }
  [[nodiscard]] std::span<const std::uint64_t> next() {
    if (at_ + batch_ > pages_.size()) {
      at_ = 0;
    }
    at_ += batch_;
    return std::span(pages_).subspan(at_ - batch_, batch_);
  }

 private:
  std::vector<std::uint64_t> pages_;
  std::size_t batch_;
  std::size_t at_ = 0;
};

/// Whether UCX's targets poll.
struct UcxBusy {
  std::atomic<bool> allocated{false};
  std::atomic<bool> own{false};
};

/// The other process: a channel with both memories as regions for each size of page. Ends with the line to its parent.
[[noreturn]] void be_target(const Settings& settings, std::span<std::byte> own, std::span<std::byte> mapped,
                            [[maybe_unused]] const UcxBusy& ucx_busy, int line) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::ranges::fill(own, std::byte{1});  // pages of its own
  std::ranges::fill(mapped, std::byte{1});
  const kvferry::SharedRegion shared(settings.mebibytes << 20,
                                     settings.huge_pages ? kvferry::HugePages::yes : kvferry::HugePages::no);
  kvferry::ShmOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.log_sink = [](const kvferry::LogRecord&) {};
  options.process_memory = !settings.rings;
  options.regions = {shared.region(latency_page), {own.data(), own.size(), latency_page}};
  kvferry::ShmTransferChannel channel(options);
  const std::string url = channel.peer_init_url();
  (void)!::write(line, url.data(), url.size());
#ifdef KVFERRY_BENCH_WITH_UCX
  const bench::UcxTarget ucx_allocated({static_cast<std::byte*>(nullptr), mapped.size()}, ucx_busy.allocated, line);
  const bench::UcxTarget ucx_own(own, ucx_busy.own, line);
#endif
  char byte = 0;
  (void)!::read(line, &byte, 1);
  channel.close();
  ::_exit(0);
}

class Bench {
 public:
  explicit Bench(const Settings& settings)
      : settings_(settings),
        size_(settings.mebibytes << 20),
        target_own_(anonymous(size_, MAP_PRIVATE)),
        target_mapped_(anonymous(size_, MAP_SHARED)),
        ucx_busy_(*new (anonymous(sizeof(UcxBusy), MAP_SHARED).data()) UcxBusy) {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) {
      throw std::system_error(errno, std::system_category(), "socketpair");
    }
    target_ = ::fork();
    if (target_ == 0) {
      ::close(ends[0]);
      be_target(settings_, target_own_, target_mapped_, ucx_busy_, ends[1]);
    }
    ::close(ends[1]);
    line_ = ends[0];
    own_ = anonymous(size_, MAP_PRIVATE);
    shared_.emplace(size_, settings_.huge_pages ? kvferry::HugePages::yes : kvferry::HugePages::no);
    for (std::size_t i = 0; i < size_; ++i) {
      own_[i] = static_cast<std::byte>(i >> 9);
    }
    std::ranges::copy(own_, shared_->data());
    kvferry::ShmOptions options;
    options.log_sink = [](const kvferry::LogRecord&) {};
    options.process_memory = !settings_.rings;
    options.regions = {shared_->region(latency_page), {own_.data(), own_.size(), latency_page}};
    channel_.emplace(options);
    std::string url(100, '\0');
    const ssize_t got = ::read(line_, url.data(), url.size());
    url.resize(got < 0 ? 0 : static_cast<std::size_t>(got));
    channel_->lazy_init_peer_connection("initiator", "target", url);
    const auto until = Clock::now() + std::chrono::seconds(10);
    while (path().find("1 of the peer's regions mapped; the peer maps 1 of") == std::string::npos) {
      if (Clock::now() > until) {
        throw std::runtime_error("the regions were not mapped: " + path());
      }
    }
#ifdef KVFERRY_BENCH_WITH_UCX
    ucx_allocated_.emplace(shared_->bytes(), line_, ucx_busy_.allocated);
    ucx_own_.emplace(own_, line_, ucx_busy_.own);
#endif
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;
  ~Bench() {
#ifdef KVFERRY_BENCH_WITH_UCX
    ucx_own_.reset();  // takes leave of the other process
    ucx_allocated_.reset();
#endif
    channel_.reset();
    ::close(line_);
    ::waitpid(target_, nullptr, 0);
  }

  [[nodiscard]] std::string path() const { return channel_->peer_info("target").value_or(kvferry::PeerInfo{}).path; }

  /// Moves a batch.
  using Way = std::function<void(TransferKind kind, const Cell& cell, std::span<const std::uint64_t> here,
                                 std::span<const std::uint64_t> there)>;
  [[nodiscard]] std::vector<std::pair<std::string, Way>> ways() {
    return {
        {"kvferry, SharedRegion", [this](auto kind, const auto& cell, auto here,
                                         auto there) { by_kvferry(kind, cell, here, there, shared_->bytes(), 0); }},
        {"kvferry, own memory",
         [this](auto kind, const auto& cell, auto here, auto there) { by_kvferry(kind, cell, here, there, own_, 1); }},
        {"memcpy", [this](auto kind, const auto& cell, auto here, auto there) { by_memcpy(kind, cell, here, there); }},
        {"process_vm",
         [this](auto kind, const auto& cell, auto here, auto there) { by_process_vm(kind, cell, here, there); }},
#ifdef KVFERRY_BENCH_WITH_UCX
        {"UCX, its memory",
         [this](auto kind, const auto& cell, auto here, auto there) {
           ucx_allocated_->move(kind == TransferKind::write, cell.page, here, there);
         }},
        {"UCX, own memory",
         [this](auto kind, const auto& cell, auto here, auto there) {
           ucx_own_->move(kind == TransferKind::write, cell.page, here, there);
         }},
#endif
    };
  }

  /// GB/s. @param order those of here and there, which go on from call to call.
  double throughput(const Way& way, TransferKind kind, const Cell& cell, PageOrder& here, PageOrder& there) {
    const auto time = std::chrono::milliseconds(settings_.milliseconds);
    const auto begin = Clock::now();
    std::size_t batches = 0;
    auto now = begin;
    do {
      way(kind, cell, here.next(), there.next());
      ++batches;
      now = Clock::now();
    } while (now - begin < time);
    rest();
    return static_cast<double>(batches * cell.batch * cell.page) /
           std::chrono::duration<double, std::nano>(now - begin).count();
  }

  /// Microseconds, of one page each.
  std::vector<double> latencies(const Way& way, TransferKind kind, PageOrder& here, PageOrder& there) {
    std::vector<double> samples;
    samples.reserve(settings_.latency_samples);
    for (std::size_t i = 0; i < settings_.latency_samples; ++i) {
      const auto begin = Clock::now();
      way(kind, {latency_page, 1}, here.next(), there.next());
      samples.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    rest();
    return samples;
  }

  /// Whether what was written can be read back, from where and to where `Way`s move it.
  void check() {
    for (const auto& [name, way] : ways()) {
      const std::array<std::uint64_t, 1> from{3};
      const std::array<std::uint64_t, 1> to{size_ / latency_page - 1};
      const std::array<std::uint64_t, 1> back{5};
      const bool shared = name == "kvferry, SharedRegion" || name == "memcpy" || name == "UCX, its memory";
      const std::span<std::byte> memory = shared ? shared_->bytes() : own_;
      std::byte* const source = memory.data() + from[0] * latency_page;
      std::ranges::generate(source, source + latency_page,
                            [random = std::mt19937(1)]() mutable { return static_cast<std::byte>(random()); });
      way(TransferKind::write, {latency_page, 1}, from, to);
      way(TransferKind::read, {latency_page, 1}, back, to);
      if (std::memcmp(source, memory.data() + back[0] * latency_page, latency_page) != 0) {
        throw std::runtime_error(name + " moved other bytes");
      }
    }
  }

 private:
  /// For the next way both CPUs are free.
  void rest() {
    ucx_busy_.allocated = false;
    ucx_busy_.own = false;
  }

  void by_kvferry(TransferKind kind, const Cell& cell, std::span<const std::uint64_t> here,
                  std::span<const std::uint64_t> there, std::span<std::byte> memory, std::uint32_t region) {
    ranges_.clear();
    for (const std::uint64_t page : there) {
      ranges_.push_back(kvferry::RemoteRange::contiguous(region, page * cell.page, cell.page));
    }
    const kvferry::TransferSpec spec{.peer_id = "target", .remote_ranges = ranges_};
    if (kind == TransferKind::write) {
      sources_.clear();
      for (const std::uint64_t page : here) {
        sources_.emplace_back(memory.data() + page * cell.page, cell.page);
      }
      channel_->batched_write(sources_, spec);
    } else {
      destinations_.clear();
      for (const std::uint64_t page : here) {
        destinations_.emplace_back(memory.data() + page * cell.page, cell.page);
      }
      channel_->batched_read(destinations_, spec);
    }
  }

  void by_memcpy(TransferKind kind, const Cell& cell, std::span<const std::uint64_t> here,
                 std::span<const std::uint64_t> there) const {
    for (std::size_t i = 0; i < here.size(); ++i) {
      std::byte* const one = shared_->data() + here[i] * cell.page;
      std::byte* const other = target_mapped_.data() + there[i] * cell.page;
      if (kind == TransferKind::write) {
        std::memcpy(other, one, cell.page);
      } else {
        std::memcpy(one, other, cell.page);
      }
    }
  }

  void by_process_vm(TransferKind kind, const Cell& cell, std::span<const std::uint64_t> here,
                     std::span<const std::uint64_t> there) {
    local_.clear();
    remote_.clear();
    for (std::size_t i = 0; i < here.size(); ++i) {
      local_.push_back({own_.data() + here[i] * cell.page, cell.page});
      remote_.push_back({target_own_.data() + there[i] * cell.page, cell.page});
    }
    const auto call = kind == TransferKind::write ? ::process_vm_writev : ::process_vm_readv;
    if (call(target_, local_.data(), local_.size(), remote_.data(), remote_.size(), 0) !=
        static_cast<ssize_t>(here.size() * cell.page)) {
      throw std::system_error(errno, std::system_category(), "process_vm");
    }
  }

  const Settings settings_;
  const std::size_t size_;
  const std::span<std::byte> target_own_;     ///< The other process has pages of its own there.
  const std::span<std::byte> target_mapped_;  ///< Both processes have the same pages there.
  UcxBusy& ucx_busy_;                         ///< In memory of both.
  std::span<std::byte> own_;
  std::optional<kvferry::SharedRegion> shared_;
  pid_t target_ = -1;
  int line_ = -1;
  std::optional<kvferry::ShmTransferChannel> channel_;
  std::vector<kvferry::RemoteRange> ranges_;
  std::vector<kvferry::ConstBuffer> sources_;
  std::vector<kvferry::MutableBuffer> destinations_;
  std::vector<iovec> local_;
  std::vector<iovec> remote_;
#ifdef KVFERRY_BENCH_WITH_UCX
  std::optional<bench::UcxInitiator> ucx_allocated_;
  std::optional<bench::UcxInitiator> ucx_own_;
#endif
};

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

std::string with_spread(const std::vector<double>& values) {
  const auto [least, most] = std::ranges::minmax(values);
  return fmt::format("{:.2f} ({:.2f}-{:.2f})", median(values), least, most);
}

constexpr std::array kinds{TransferKind::write, TransferKind::read};

void print_throughput(Bench& bench, const Settings& settings) {
  const auto ways = bench.ways();
  fmt::print(
      "GB/s, median (least-most) of {} interleaved rounds; the ratios are to the better one of memcpy and "
      "process_vm\n\n",
      settings.rounds);
  fmt::print("| operation | cell |");
  for (const auto& [name, way] : ways) {
    fmt::print(" {} |", name);
  }
  fmt::print(" ratio, SharedRegion | ratio, own |\n|---|---|---|---|");
  for (std::size_t i = 0; i < ways.size(); ++i) {
    fmt::print("---|");
  }
  fmt::print("\n");
  for (const auto kind : kinds) {
    for (const Cell& cell : cells) {
      if (!settings.only.empty() && std::ranges::find(settings.only, cell.name()) == settings.only.end()) {
        continue;
      }
      PageOrder here(settings.mebibytes << 20, cell, 1);
      PageOrder there(settings.mebibytes << 20, cell, 2);
      std::vector<std::vector<double>> results(ways.size());
      for (std::size_t round = 0; round <= settings.rounds; ++round) {
        for (std::size_t i = 0; i < ways.size(); ++i) {
          const std::size_t way = (i + round) % ways.size();
          const double result = bench.throughput(ways[way].second, kind, cell, here, there);
          if (round != 0) {  // the first one has page tables filled
            results[way].push_back(result);
          }
        }
      }
      const double best = std::max(median(results[2]), median(results[3]));
      fmt::print("| {} | {} |", kvferry::to_string(kind), cell.name());
      for (const auto& result : results) {
        fmt::print(" {} |", with_spread(result));
      }
      fmt::print(" {:.2f} | {:.2f} |\n", median(results[0]) / best, median(results[1]) / best);
      std::fflush(stdout);
    }
  }
}

void print_latency(Bench& bench, const Settings& settings) {
  const auto ways = bench.ways();
  fmt::print("\nOne page of 4 KiB, blocking, microseconds: median of {} rounds' p50 (least-most)\n\n| operation |",
             settings.rounds);
  for (const auto& [name, way] : ways) {
    fmt::print(" {} |", name);
  }
  fmt::print("\n|---|");
  for (std::size_t i = 0; i < ways.size(); ++i) {
    fmt::print("---|");
  }
  fmt::print("\n");
  for (const auto kind : kinds) {
    const Cell cell{latency_page, 1};
    PageOrder here(settings.mebibytes << 20, cell, 3);
    PageOrder there(settings.mebibytes << 20, cell, 4);
    std::vector<std::vector<double>> results(ways.size());
    for (std::size_t round = 0; round <= settings.rounds; ++round) {
      for (std::size_t way = 0; way < ways.size(); ++way) {
        const double result = median(bench.latencies(ways[way].second, kind, here, there));
        if (round != 0) {
          results[way].push_back(result);
        }
      }
    }
    fmt::print("| {} |", kvferry::to_string(kind));
    for (const auto& result : results) {
      fmt::print(" {} |", with_spread(result));
    }
    fmt::print("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Batches of scattered pages between two processes of one host, beside what one copy costs.");
  app.add_option("--rounds", settings.rounds, "Rounds that count")->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_option("--time", settings.milliseconds, "Milliseconds of each way of each cell in each round")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  app.add_option("--memory", settings.mebibytes, "MiB of each memory; there are three on either side")
      ->check(CLI::Range(64, 65536))
      ->capture_default_str();
  app.add_option("--samples", settings.latency_samples, "Pages moved one by one in each round")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_flag("--huge-pages", settings.huge_pages, "SharedRegions are of huge pages");
  app.add_flag("--rings", settings.rings, "Own memory is copied through rings, not by the kernel");
  app.add_option("--only", settings.only, "Cells, such as 4Kx256, in place of all cells and single pages");
  CLI11_PARSE(app, argc, argv);
  try {
    Bench bench(settings);
    bench.check();
    fmt::print("{}\n\n", bench.path());
    print_throughput(bench, settings);
    if (settings.only.empty()) {
      print_latency(bench, settings);
    }
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
  return 0;
}
