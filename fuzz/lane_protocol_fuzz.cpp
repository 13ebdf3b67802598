// SPDX-License-Identifier: Apache-2.0
// What a data connection makes of any bytes, with a transfer of each kind under way: no byte outside the regions and
// the transfers' buffers is touched, every transfer ends exactly once, and memory stays bounded.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "tests/tcp/protocol_harness.hpp"

namespace {

using kvferry::TransferKind;
using kvferry::tcp::testing::Outcome;
using kvferry::tcp::testing::Side;

kvferry::TransferRequest request(Side& side, TransferKind kind, std::size_t first) {
  kvferry::TransferRequest made;
  made.kind = kind;
  made.peer_id = "peer";
  made.objects = {side.page_at(first), side.page_at(first + 1, 100)};
  if (made.one_sided()) {
    made.remote_indexes = {3, 4};
  }
  return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) {
    return 0;
  }
  Side side(16);
  std::vector<std::shared_ptr<Outcome>> outcomes;
  std::size_t page = 0;
  for (const auto kind : {TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv}) {
    outcomes.push_back(std::make_shared<Outcome>());
    side.start(request(side, kind, page), outcomes.back());
    page += 2;
  }
  const std::size_t step = data[0] == 0 ? 1 : std::size_t{data[0]} * 16;
  if ((data[1] & 1) != 0) {
    (void)side.take(std::size_t{1} << 20);  // so that acknowledgements are plausible
  }
  const bool broken = static_cast<bool>(side.feed(std::as_bytes(std::span(data + 2, size - 2)), step));
  if (!broken) {
    while (!side.take(std::size_t{1} << 20).empty()) {
    }
  }
  side.protocol->fail(kvferry::errc::connection_lost, "the input ends");
  for (const auto& outcome : outcomes) {
    if (outcome->calls != 1) {
      std::abort();
    }
  }
  return 0;
}
