// SPDX-License-Identifier: Apache-2.0
// What it costs to submit a write of very many descriptors: as page indexes, as byte ranges, and as one strided range.
#include <asio/use_future.hpp>

#include <fmt/core.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

namespace {

using Clock = std::chrono::steady_clock;

struct Sizes {
  std::size_t descriptors = 100'000;
  std::size_t block = 4096;
  std::size_t rounds = 7;

  /// So that blocks don't touch: those that do are one.
  [[nodiscard]] std::size_t stride() const { return block + 64; }
  [[nodiscard]] std::size_t region_bytes() const { return (descriptors * stride() / block + 1) * block; }
};

double nanoseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

class Pair {
 public:
  explicit Pair(const Sizes& sizes)
      : sizes_(sizes),
        source_(sizes.region_bytes(), std::byte{1}),
        destination_(sizes.region_bytes()),
        initiator_(options(source_, "")),
        target_(options(destination_, "tcp://127.0.0.1:0")) {
    initiator_.lazy_init_peer_connection("initiator", "target", target_.peer_init_url());
  }

  /// Scattered blocks of `block` bytes each.
  [[nodiscard]] std::vector<kvferry::ConstBuffer> blocks(const std::vector<std::uint64_t>& order) const {
    std::vector<kvferry::ConstBuffer> result;
    for (const std::uint64_t place : order) {
      result.emplace_back(source_.data() + place * sizes_.block, sizes_.block);
    }
    return result;
  }
  [[nodiscard]] kvferry::ConstBuffer all() const {
    return {source_.data(), (sizes_.descriptors - 1) * sizes_.stride() + sizes_.block};
  }

  /// Prints how long the call took, and how long until all was there. @param moved the lists are handed over, not copied.
  void measure(std::string_view what, const std::vector<kvferry::ConstBuffer>& objects,
               const kvferry::TransferSpec& spec, bool moved = false) {
    std::vector<double> submitting;
    std::vector<double> moving;
    for (std::size_t round = 0; round < sizes_.rounds; ++round) {
      std::vector<kvferry::ConstBuffer> given = objects;
      kvferry::TransferRequest request;
      if (moved) {
        request = kvferry::BaseTransferChannel::make_request(kvferry::TransferKind::write, objects, spec);
      }
      const auto begin = Clock::now();
      auto write =
          moved ? initiator_.async_transfer(std::move(request), asio::use_future)
                : initiator_.async_batched_write(kvferry::ConstObjects(std::move(given)), spec, asio::use_future);
      submitting.push_back(nanoseconds_since(begin));
      write.get();
      moving.push_back(nanoseconds_since(begin));
    }
    const auto count = static_cast<double>(sizes_.descriptors);
    fmt::print("| {} | {:.1f} | {:.1f} | {:.2f} |\n", what, median(submitting) / count,
               *std::ranges::min_element(submitting) / count,
               count * static_cast<double>(sizes_.block) / median(moving));
  }

 private:
  [[nodiscard]] kvferry::TcpOptions options(std::vector<std::byte>& memory, const std::string& url) const {
    kvferry::TcpOptions options;
    options.regions = {{memory.data(), memory.size(), sizes_.block}};
    options.peer_init_url = url;
    return options;
  }

  const Sizes sizes_;
  std::vector<std::byte> source_;
  std::vector<std::byte> destination_;
  kvferry::TcpTransferChannel initiator_;
  kvferry::TcpTransferChannel target_;
};

}  // namespace

int main(int argc, char** argv) {
  Sizes sizes;
  CLI::App app(
      "Measures what it costs to submit a write of many descriptors over TCP, on loopback: the asynchronous call, "
      "until it "
      "returns.");
  app.add_option("--descriptors", sizes.descriptors, "How many a write has")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
      ->capture_default_str();
  app.add_option("--block", sizes.block, "Bytes of each")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->capture_default_str();
  app.add_option("--rounds", sizes.rounds, "How often all is measured")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  Pair pair(sizes);
  std::vector<std::uint64_t> order(sizes.descriptors);
  std::iota(order.begin(), order.end(), std::uint64_t{0});
  std::ranges::shuffle(order, std::mt19937_64(1));
  const auto blocks = pair.blocks(order);
  std::ranges::shuffle(order, std::mt19937_64(2));
  std::vector<kvferry::RemoteRange> ranges;
  for (const std::uint64_t place : order) {
    ranges.push_back(kvferry::RemoteRange::contiguous(0, place * sizes.block, sizes.block));
  }
  const std::vector<kvferry::RemoteRange> strided{
      kvferry::RemoteRange::strided(0, 0, sizes.block, sizes.stride(), sizes.descriptors)};
  const std::vector<kvferry::LocalStride> stride{{sizes.block, sizes.stride()}};

  fmt::print("{} descriptors of {} bytes, {} rounds\n\n", sizes.descriptors, sizes.block, sizes.rounds);
  fmt::print("| write by | submit, ns a descriptor (median) | (least) | GB/s in all |\n| --- | ---: | ---: | ---: |\n");
  pair.measure("page indexes", blocks, {.peer_id = "target", .remote_indexes = order});
  pair.measure("byte ranges", blocks, {.peer_id = "target", .remote_ranges = ranges});
  pair.measure("byte ranges, handed over", blocks, {.peer_id = "target", .remote_ranges = ranges}, true);
  pair.measure("one strided range", {pair.all()},
               {.peer_id = "target", .remote_ranges = strided, .local_strides = stride});
}
