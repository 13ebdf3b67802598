// SPDX-License-Identifier: Apache-2.0
// Includes kvferry behind macros that programs and other libraries define.
#include <asio.hpp>
#include <msgpack.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <ranges>
#include <set>

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

int main() {
  kvferry::TcpOptions options;
  options.poll = kvferry::PollPolicy::always();
  const auto message = kvferry::encode_side_message(kvferry::PySocketInitResponse{"ok"});
  return kvferry::decode_side_message<kvferry::PySocketInitResponse>(message).status == "ok" ? 0 : 1;
}
