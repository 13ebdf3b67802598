// SPDX-License-Identifier: Apache-2.0
// Includes kvferry, all transports but RDMA, behind macros that programs and other libraries define. Pages move between two channels,
// over shared memory.
#include <asio.hpp>
#include <msgpack.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <limits>
#include <map>
#include <ranges>
#include <set>
#include <type_traits>
#include <vector>

// Qt's
#define emit
#define foreach(a, b) for (a : b)
#define forever for (;;)
#define signals public
#define slots
// The kernel's, and many C libraries'
#define max(a, b) ((a) > (b) ? (a) : (b))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define likely(x) (x)
#define unlikely(x) (x)
#define PAGE_SIZE 4096
// X11's
#define Always 2
#define Bool int
#define None 0
#define Status int
#define Success 0
// Loggers' and Windows'
#define CHECK(x) (void)(x)
#define DEBUG 1
#define ERROR 0
#define INFO 1
#define check(x) (void)(x)
#define interface struct
#define small char

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/completion_queue.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

// They are the program's own again.
static_assert(max(2, 1) == 2 && min(2, 1) == 1);
static_assert(sizeof(small) == 1);
#if !defined(check) || !defined(emit) || !defined(foreach) || !defined(interface) || !defined(signals) || \
    !defined(slots)
#error "a macro of the program is gone"
#endif

namespace {

bool moves_a_page() {
  constexpr std::size_t page_size = 4096;
  const kvferry::SharedRegion cache(4 * page_size);
  kvferry::AutoOptions options;
  options.regions = {cache.region(page_size)};
  options.peer_init_url = "tcp://127.0.0.1:0";
  kvferry::AutoTransferChannel decode(options);

  kvferry::AutoTransferChannel prefill(kvferry::AutoOptions{});
  prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
  const std::vector<std::byte> page(page_size, std::byte{0x2a});
  const std::array<std::uint64_t, 1> index{2};
  prefill.batched_write({kvferry::ConstBuffer(page)}, {.peer_id = "decode", .remote_indexes = index});

  const auto path = prefill.peer_info("decode")->path;
  std::cout << path << "\n";
  const bool arrived = std::ranges::equal(page, cache.bytes().subspan(2 * page_size, page_size));
  return arrived && path.starts_with("shm");
}

}  // namespace

int main() {
  const auto message = kvferry::encode_side_message(kvferry::PySocketInitResponse{"ok"});
  static_assert(std::is_same_v<decltype(kvferry::PollPolicy::always()), kvferry::PollPolicy>);
  const bool decodes = kvferry::decode_side_message<kvferry::PySocketInitResponse>(message).status == "ok";
  return decodes && moves_a_page() ? 0 : 1;
}
