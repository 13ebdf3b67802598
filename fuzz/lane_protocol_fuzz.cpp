// SPDX-License-Identifier: Apache-2.0
// A data connection gets any bytes, with a transfer of each kind under way: no byte changes that no frame names, none
// of a region that peers may not read is told to them, every transfer ends exactly once, and memory stays bounded. Each region
// and each buffer is an allocation of its own, so that AddressSanitizer sees a byte too many.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "fuzz/frame_maker.hpp"
#include "fuzz/input.hpp"
#include "fuzz/lane_model.hpp"
#include "tests/tcp/peer_block.hpp"
#include "tests/tcp/protocol_harness.hpp"

namespace {

using kvferry::Access;
using kvferry::TransferKind;
using kvferry::fuzz::require;
using kvferry::tcp::testing::LaneModel;
using kvferry::tcp::testing::Outcome;
using kvferry::tcp::testing::Side;

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 4;
constexpr std::array accesses{Access::read_write, Access::none, Access::read, Access::write};
constexpr std::array kinds{TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv};
constexpr std::string_view secret = "no peer may read this.";

/// A block that knows what it was.
struct Block {
  explicit Block(std::size_t size, std::string_view pattern) : now(size) {
    for (std::size_t i = 0; i < size; ++i) {
      now[i] = static_cast<std::byte>(pattern[i % pattern.size()]);
    }
    before = now;
  }
  [[nodiscard]] bool changed() const { return now != before; }

  std::vector<std::byte> now;
  std::vector<std::byte> before;
};

/// Of the peer's, which may be fetched by reference.
std::vector<std::byte> peers_memory() {
  std::vector<std::byte> bytes(2 * page);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
  }
  return bytes;
}

/// Bytes that are frames, or nearly.
std::vector<std::byte> frames_of(kvferry::fuzz::Input input) {
  kvferry::fuzz::FrameMaker maker(input, {.pages = pages, .page_size = page, .referable = 2 * page});
  for (std::uint64_t id = 1; id <= kinds.size(); ++id) {
    maker.heard(id);
  }
  std::vector<std::byte> bytes;
  for (int i = 0; i < 64 && !input.empty(); ++i) {
    auto header = maker.header();
    const auto frame = maker.with_body(header);
    bytes.insert(bytes.end(), frame.begin(), frame.end());
  }
  return bytes;
}

bool contains(std::span<const std::byte> bytes, std::string_view text) {
  const auto wanted = std::as_bytes(std::span(text));
  return std::search(bytes.begin(), bytes.end(), wanted.begin(), wanted.end()) != bytes.end();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) {
    return 0;
  }
  const bool fetches = (data[1] & 128) != 0;
  auto input = std::as_bytes(std::span(data + 3, size - 3));
  std::vector<std::byte> frames;
  if (kvferry::fuzz::Input choices(data + 3, size - 3); fetches && choices.flag()) {
    frames = frames_of(choices);
    input = frames;
  }
  const auto peers = peers_memory();
  std::shared_ptr<kvferry::tcp::testing::PeerBlock> memory;
  if (fetches) {
    memory = std::make_shared<kvferry::tcp::testing::PeerBlock>(false);
    memory->is(peers, 0);
  }

  std::vector<Block> regions;
  std::vector<kvferry::MemoryRegion> offered;
  for (const Access access : accesses) {
    const bool readable = access == Access::read_write || access == Access::read;
    regions.emplace_back(page * pages, readable ? "open to peers" : secret);
    offered.push_back({regions.back().now.data(), page * pages, page, access});
  }
  std::vector<Block> buffers;  // two for each transfer
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    buffers.emplace_back(page, "a buffer");
    buffers.emplace_back(100, "another");
  }

  std::vector<std::byte> said;
  std::vector<std::shared_ptr<Outcome>> outcomes;
  {
    Side side(offered, memory);
    std::vector<std::shared_ptr<kvferry::kit::Operation>> operations;
    for (std::size_t i = 0; i < kinds.size(); ++i) {
      outcomes.push_back(std::make_shared<Outcome>());
      auto request = kvferry::tcp::testing::request(
          kinds[i], {{buffers[2 * i].now.data(), page}, {buffers[2 * i + 1].now.data(), 100}});
      if (request.one_sided()) {
        if ((data[1] & 64) == 0) {
          request.remote_indexes = {2, 3};
        } else {
          request.remote_ranges = {kvferry::RemoteRange::strided(0, 5, 64, 100, 64),
                                   kvferry::RemoteRange::contiguous(3, 7, 40)};
          request.local_strides = {{}, {10, 30}};
        }
      }
      operations.push_back(side.start(std::move(request), outcomes.back()));
    }
    const auto listen = [&] {
      for (;;) {
        const auto bytes = side.take(std::size_t{1} << 20);
        if (bytes.empty()) {
          return;
        }
        said.insert(said.end(), bytes.begin(), bytes.end());
      }
    };
    const std::size_t step = data[0] == 0 ? 1 : std::size_t{data[0]} * 16;
    if ((data[1] & 1) != 0) {
      listen();  // so that acknowledgements are plausible
    }
    const std::size_t half = input.size() * data[2] / 256;
    bool broken = static_cast<bool>(side.feed(input.first(half), step));
    if (!broken) {
      for (std::size_t i = 0; i < operations.size(); ++i) {
        if ((data[1] & (2U << i)) != 0) {
          side.stop(*operations[i]);
        }
      }
      if ((data[1] & 32) != 0) {
        listen();
      }
      broken = static_cast<bool>(side.feed(input.subspan(half), step));
    }
    if (!broken) {
      listen();
    }
    side.protocol->fail(kvferry::errc::connection_lost, "the input ends");
  }

  LaneModel model({0, 3}, pages, page, memory ? peers : std::span<const std::byte>());
  model.read(input);
  for (std::uint32_t region = 0; region < regions.size(); ++region) {
    if (!regions[region].changed()) {
      continue;
    }
    for (std::size_t i = 0; i < page * pages; ++i) {
      require(model.may_be(region, i, regions[region].now[i], regions[region].before[i]),
              "no byte changes that no frame names");
    }
  }
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const bool receives = kinds[i] == TransferKind::read || kinds[i] == TransferKind::recv;
    if (!receives || !model.may_have_received(i + 1)) {
      require(!buffers[2 * i].changed() && !buffers[2 * i + 1].changed(), "no buffer changes that no frame is for");
    }
    require(outcomes[i]->calls == 1, "each transfer ends once");
  }
  require(!contains(said, secret) || contains(input, secret), "nobody is told what peers may not read");
  return 0;
}
