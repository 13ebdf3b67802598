// SPDX-License-Identifier: Apache-2.0
// A whole lying peer against a channel, over loopback: handshakes that are honest or not, any frame at any time, answers to what
// was never asked, halves of frames, connections that end, while the channel has operations of its own with the liar and an
// honest peer works with the channel. No byte changes but those that the liar had the right to change, it is told nothing that
// peers may not read, the honest peer sees no error, every operation ends, and nothing is left over. The input is what happens.
#include <sanitizer/allocator_interface.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fuzz/attacked_channel.hpp"
#include "fuzz/descriptors.hpp"
#include "fuzz/input.hpp"
#include "fuzz/lane_model.hpp"
#include "fuzz/liar.hpp"
#include "fuzz/lying_peer.hpp"

namespace {

using namespace kvferry;
using namespace kvferry::fuzz;
using namespace std::chrono_literals;

constexpr std::size_t page = AttackedChannel::page;
constexpr std::size_t most_actions = 96;
constexpr std::size_t most_operations = 24;
/// After so many inputs a new channel is attacked.
constexpr std::size_t inputs_of_channel = 64;
constexpr std::size_t most_growth = std::size_t{192} << 20;
constexpr std::size_t most_descriptors = 256;

/// An operation of the channel's with the liar.
struct Lent {
  TransferKind kind{};
  std::vector<std::unique_ptr<GuardedMemory>> objects;
  asio::cancellation_signal signal;
  std::atomic<int> calls{0};
  std::error_code ec;
};

class Session {
 public:
  Session(Input& input, AttackedChannel& attacked, LiarsHandshakes& handshakes, LiarsListener& listener)
      : input_(input), attacked_(attacked), liar_(input, attacked, handshakes, listener), url_(handshakes.url()) {}

  void run() {
    attacked_.disturb();
    const std::size_t before = __sanitizer_get_current_allocated_bytes();
    for (std::size_t i = 0; i < most_actions && !input_.empty(); ++i) {
      act();
      require(__sanitizer_get_current_allocated_bytes() < before + most_growth, "memory is bounded");
    }
    require(open_descriptors().size() < most_descriptors, "descriptors are bounded");
    liar_.listen(1);
    liar_.close_all();
    wait_for_operations();
    quiesce();
    check();
    attacked_.disturb();
    attacked_.settle();
    check();  // nothing has come since
    for (auto& region : attacked_.regions) {
      region.restore();
    }
  }

 private:
  void act() {
    switch (input_.choice(20)) {
      case 0: liar_.ask(); break;
      case 1: liar_.connect(); break;
      case 2:
        liar_.ask();
        liar_.connect();
        break;
      case 3: liar_.intrude(); break;
      case 4: liar_.raw(); break;
      case 5: liar_.close(); break;
      case 6: liar_.babble(); break;
      case 7: liar_.listen(1); break;
      case 8: call(); break;
      case 9: start(); break;
      case 10:
        if (!operations_.empty()) {
          operations_[input_.choice(operations_.size())]->signal.emit(asio::cancellation_type::terminal);
        }
        break;
      case 11: liar_.serve(); break;
      case 12: attacked_.disturb(); break;
      case 13: fence(); break;
      case 14:
        liar_.listen(1);
        liar_.reply();
        break;
      case 15: start_and_reply(); break;
      default: liar_.frame(); break;
    }
  }

  std::string some_peer() { return LyingPeer::ids[input_.choice(2)]; }

  void start_and_reply() {
    start();
    liar_.listen(2);
    liar_.reply();
  }

  void start() {
    if (operations_.size() == most_operations) {
      return;
    }
    constexpr std::array kinds{TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv};
    operations_.push_back(std::make_shared<Lent>());
    const auto lent = operations_.back();
    const std::size_t choice = input_.number();
    lent->kind = kinds[choice % kinds.size()];
    const std::size_t count = 1 + input_.choice(4);
    std::vector<MutableBuffer> objects;
    std::vector<std::uint64_t> indexes;
    for (std::size_t i = 0; i < count; ++i) {
      lent->objects.push_back(std::make_unique<GuardedMemory>(1 + input_.number() * 16U, "an object"));
      objects.push_back(lent->objects.back()->bytes());
      indexes.push_back(input_.choice(4));
    }
    TransferSpec spec{
        .peer_id = "liar", .tag = input_.choice(4), .timeout = std::chrono::milliseconds(input_.number())};
    spec.checksums = choice / kinds.size() % 2 == 1;
    const std::string peer = some_peer();
    spec.peer_id = peer;
    const auto notification = input_.bytes(input_.choice(8));
    const auto done = [&lent] {
      return asio::bind_cancellation_slot(lent->signal.slot(), [lent](std::error_code ec, std::size_t) {
        lent->ec = ec;
        ++lent->calls;
      });
    };
    switch (lent->kind) {
      case TransferKind::write:
        spec.remote_indexes = indexes;
        spec.notification = notification;
        attacked_.channel.async_batched_write(objects, spec, done());
        break;
      case TransferKind::read:
        spec.remote_indexes = indexes;
        attacked_.channel.async_batched_read(objects, spec, done());
        break;
      case TransferKind::send: attacked_.channel.async_batched_send(objects, spec, done()); break;
      case TransferKind::recv: attacked_.channel.async_batched_recv(objects, spec, done()); break;
    }
  }

  /// Has the channel connect to the liar.
  void call() {
    ++calls_begun_;
    attacked_.channel.async_lazy_init_peer_connection(
        "attacked", some_peer(), url_, {}, {.timeout = 50ms + std::chrono::milliseconds(input_.number())},
        [ended = calls_ended_](std::error_code, const std::optional<SideMessage>&) { ++*ended; });
  }

  void fence() {
    ++calls_begun_;
    attacked_.channel.async_fence(some_peer(), std::chrono::milliseconds(input_.number()),
                                  [ended = calls_ended_](std::error_code) { ++*ended; });
  }

  void wait_for_operations() {
    const auto until = std::chrono::steady_clock::now() + AttackedChannel::patience;
    const auto all_ended = [&] {
      return *calls_ended_ == calls_begun_ &&
             std::ranges::all_of(operations_, [](const auto& lent) { return lent->calls != 0; });
    };
    while (!all_ended()) {
      require(std::chrono::steady_clock::now() < until, "every operation ends");
      std::this_thread::sleep_for(1ms);
    }
  }

  /// Returns when nothing of the liar's can land any more.
  void quiesce() {
    for (const char* const id : LyingPeer::ids) {
      if (std::string(id) != "honest") {
        std::error_code ec;
        attacked_.channel.fence(id, AttackedChannel::patience, ec);
        require(ec != errc::timed_out, "a fence ends");
      }
    }
    for (;;) {
      std::error_code ec;
      const auto notification = attacked_.channel.receive_notification(0ms, ec);
      if (ec) {
        return;
      }
      require(notification.peer_id != "honest" && notification.payload.size() <= tcp::max_notification_bytes,
              "a notification comes from who says it");
    }
  }

  void check() {
    tcp::testing::LaneModel model({0, 3}, AttackedChannel::pages, page);
    for (const auto& lane : liar_.lanes()) {
      model.read(lane.said);
      require(!contains(lane.heard, AttackedChannel::secret), "nobody is told what peers may not read");
    }
    for (std::uint32_t i = 0; i < attacked_.regions.size(); ++i) {
      const auto& region = attacked_.regions[i];
      require(region.margins_are_whole(), "nothing is written outside of a region");
      const auto bytes = region.bytes();
      for (std::size_t at = 0; i != AttackedChannel::honest_region && at < bytes.size(); ++at) {
        require(bytes[at] == region.first_value(at) ||
                    (liar_.was_accepted() && model.may_be(i, at, bytes[at], region.first_value(at))),
                "no byte changes that no frame names");
      }
    }
    check_operations(model);
  }

  void check_operations(const tcp::testing::LaneModel& model) {
    using tcp::FrameType;
    const auto count = [&](TransferKind kind) {
      return static_cast<std::size_t>(
          std::ranges::count_if(operations_, [&](const auto& lent) { return lent->kind == kind && !lent->ec; }));
    };
    for (const auto& lent : operations_) {
      require(lent->calls == 1, "an operation ends once");
      const bool may_change = (lent->kind == TransferKind::read && model.has(FrameType::read_data)) ||
                              (lent->kind == TransferKind::recv && model.has(FrameType::send_data));
      for (const auto& object : lent->objects) {
        require(object->margins_are_whole() && (may_change || !object->changed()),
                "no buffer changes that no frame is for");
      }
    }
    require(count(TransferKind::write) <= model.good_ones(FrameType::write_ack),
            "a write succeeds if the peer says so");
    require(count(TransferKind::send) <= model.good_ones(FrameType::send_ack), "a send succeeds if the peer says so");
    require(count(TransferKind::read) <= model.good_ones(FrameType::read_data), "a read succeeds if its data came");
    require(count(TransferKind::recv) <= model.good_ones(FrameType::send_data), "a recv succeeds if its data came");
  }

  static bool contains(std::span<const std::byte> bytes, std::string_view text) {
    const auto wanted = std::as_bytes(std::span(text));
    return std::search(bytes.begin(), bytes.end(), wanted.begin(), wanted.end()) != bytes.end();
  }

  Input& input_;
  AttackedChannel& attacked_;
  LyingPeer liar_;
  const std::string url_;
  std::vector<std::shared_ptr<Lent>> operations_;
  std::size_t calls_begun_ = 0;
  std::shared_ptr<std::atomic<std::size_t>> calls_ended_ = std::make_shared<std::atomic<std::size_t>>(0);
};

/// The objects that live longer than an input.
struct Stage {
  LiarsHandshakes handshakes;
  LiarsListener listener;
  std::optional<AttackedChannel> attacked;
  std::size_t inputs = 0;
  std::optional<std::size_t> descriptors_before;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Stage stage;
  if (stage.inputs++ % inputs_of_channel == 0) {
    stage.attacked.reset();
    // The objects that the process keeps are there after the first channel. ZeroMQ closes its sockets by and by.
    if (stage.inputs > 1) {
      const auto until = std::chrono::steady_clock::now() + AttackedChannel::patience;
      stage.descriptors_before = stage.descriptors_before.value_or(open_descriptors().size());
      while (open_descriptors().size() > *stage.descriptors_before) {
        if (std::chrono::steady_clock::now() > until) {
          print(open_descriptors());
          require(false, "a channel leaves no descriptor behind");
        }
        std::this_thread::sleep_for(1ms);
      }
    }
    stage.attacked.emplace();
  }
  Input input(data, size);
  Session(input, *stage.attacked, stage.handshakes, stage.listener).run();
  return 0;
}
