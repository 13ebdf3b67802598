// SPDX-License-Identifier: Apache-2.0
// Measures the cost of submitting a write of very many descriptors: as page indexes, as byte ranges, and as one strided range.
#include <asio/use_future.hpp>

#include <fmt/core.h>
#include <CLI/CLI.hpp>

#include <cstddef>
#include <cstdint>
#include <future>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include "common/descriptors.hpp"

namespace {

class Pair {
 public:
  explicit Pair(const bench::Descriptors& sizes)
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
    return {source_.data(), (sizes_.count - 1) * sizes_.stride() + sizes_.block};
  }

  /// @param moved the lists are handed over, not copied.
  void measure(std::string_view what, const std::vector<kvferry::ConstBuffer>& objects,
               const kvferry::TransferSpec& spec, bool moved = false) {
    std::vector<kvferry::ConstBuffer> given;
    kvferry::TransferRequest request;
    std::future<std::size_t> write;
    sizes_.measure(
        what,
        [&] {
          given = objects;
          if (moved) {
            request = kvferry::BaseTransferChannel::make_request(kvferry::TransferKind::write, objects, spec);
          }
        },
        [&] {
          write = moved
                      ? initiator_.async_transfer(std::move(request), asio::use_future)
                      : initiator_.async_batched_write(kvferry::ConstObjects(std::move(given)), spec, asio::use_future);
        },
        [&] { write.get(); });
  }

 private:
  [[nodiscard]] kvferry::TcpOptions options(std::vector<std::byte>& memory, const std::string& url) const {
    kvferry::TcpOptions options;
    options.regions = {{memory.data(), memory.size(), sizes_.block}};
    options.peer_init_url = url;
    return options;
  }

  const bench::Descriptors sizes_;
  std::vector<std::byte> source_;
  std::vector<std::byte> destination_;
  kvferry::TcpTransferChannel initiator_;
  kvferry::TcpTransferChannel target_;
};

}  // namespace

int main(int argc, char** argv) {
  bench::Descriptors sizes;
  CLI::App app(
      "Measures what it costs to submit a write of many descriptors over TCP, on loopback: the asynchronous call, "
      "until it "
      "returns.");
  sizes.add_options(app);
  CLI11_PARSE(app, argc, argv);

  Pair pair(sizes);
  const auto blocks = pair.blocks(sizes.scattered(1));
  const auto order = sizes.scattered(2);
  std::vector<kvferry::RemoteRange> ranges;
  for (const std::uint64_t place : order) {
    ranges.push_back(kvferry::RemoteRange::contiguous(0, place * sizes.block, sizes.block));
  }
  const std::vector<kvferry::RemoteRange> strided{
      kvferry::RemoteRange::strided(0, 0, sizes.block, sizes.stride(), sizes.count)};
  const std::vector<kvferry::LocalStride> stride{{sizes.block, sizes.stride()}};

  fmt::print("{} descriptors of {} bytes, {} rounds\n\n", sizes.count, sizes.block, sizes.rounds);
  sizes.print_head();
  pair.measure("kvferry: page indexes", blocks, {.peer_id = "target", .remote_indexes = order});
  pair.measure("kvferry: byte ranges", blocks, {.peer_id = "target", .remote_ranges = ranges});
  pair.measure("kvferry: byte ranges, handed over", blocks, {.peer_id = "target", .remote_ranges = ranges}, true);
  pair.measure("kvferry: one strided range", {pair.all()},
               {.peer_id = "target", .remote_ranges = strided, .local_strides = stride});
}
