// SPDX-License-Identifier: Apache-2.0
// Two ends of a rail with adapters that take their time: several lists are out at once, requests are carried out and lists
// completed whenever the dice say so, operations are given up and queue pairs break in the middle.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/rail_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

constexpr std::size_t buffers = 8;
constexpr std::size_t pages = 256;
constexpr std::size_t own_pages = pages / 2;  // an operation's buffers; the others are for the peer's writes and reads
constexpr std::size_t spare_requests = 2;

class Pair {
 public:
  explicit Pair(unsigned seed) : random_(seed), grows_(seed % 2 != 0) {
    for (End& end : ends_) {
      end.side->first_buffers = min_first_messages;
      end.side->most_slots = 2 * slot_count;
    }
    join();
  }

  void run(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFatalFailure(); ++i) {
      step();
    }
    finish();
  }

  [[nodiscard]] std::size_t succeeded() const { return succeeded_; }
  [[nodiscard]] std::size_t breaks() const { return breaks_; }
  [[nodiscard]] std::size_t most_lists() const { return most_lists_; }
  [[nodiscard]] std::size_t growths() const { return growths_; }

 private:
  struct Posted {
    std::unique_ptr<WorkList> list;
    std::size_t carried_out = 0;
  };

  struct End {
    std::unique_ptr<Side> side = std::make_unique<Side>(pages, buffers);
    std::deque<Posted> posted;
    std::array<bool, pages> lent{};  ///< Pages of an operation's that has not ended, of either end.
    std::size_t next_page = 0;       ///< Whose turn it is, so that a page isn't lent again soon.
    std::size_t next_target = own_pages;
  };

  /// An operation, and the pages that it has been lent.
  struct Active {
    std::size_t end = 0;
    std::shared_ptr<kit::Operation> operation;
    std::shared_ptr<Outcome> outcome;
    std::size_t first = 0;   ///< At its own end.
    std::size_t target = 0;  ///< At the other one, of a write or read.
    std::size_t count = 0;
  };

  std::size_t dice(std::size_t sides) { return std::uniform_int_distribution<std::size_t>(0, sides - 1)(random_); }

  void join() {
    ends_[0].side->join(*ends_[1].side);
    ends_[1].side->join(*ends_[0].side);
  }

  void step() {
    const std::size_t end = dice(2);
    switch (dice(16)) {
      case 0:
      case 1: start(end); break;
      case 2:
        if (!active_.empty() && dice(6) == 0) {
          active_[dice(active_.size())].operation->request_stop(errc::cancelled);
        }
        break;
      case 3:
        if (dice(400) == 0) {
          break_pair();
        }
        break;
      case 4:
        if (dice(20) == 0) {
          ++fences_out_;
          ends_[end].side->protocol->fence([this] { --fences_out_; });
        }
        break;
      default: move(end, dice(5)); break;
    }
    look_at_ends();
  }

  /// One of an adapter's or a driver's moves. @return whether there was anything to do.
  bool move(std::size_t end, std::size_t which) {
    switch (which) {
      case 0: return post(end);
      case 1: return carry_out_one(end);
      case 2: return complete(end);
      case 3: return receive(end);
      default: return grow(end);
    }
  }

  bool grow(std::size_t end) {
    Side& side = *ends_[end].side;
    if (!grows_ && (side.protocol->wants_slots() || side.protocol->wants_buffers())) {
      side.protocol->stay_small();
    }
    const bool grown = side.grow();
    growths_ += grown ? 1U : 0U;
    return grown;
  }

  bool post(std::size_t end) {
    Side& side = *ends_[end].side;
    side.protocol->begin_fences(side.protocol->fences_asked());
    auto list = std::make_unique<WorkList>();
    if (!side.protocol->fill(*list)) {
      return false;
    }
    EXPECT_LE(side.protocol->posted(), queue_depth + spare_requests);
    (void)list->finish();
    ends_[end].posted.push_back({std::move(list), 0});
    most_lists_ = std::max(most_lists_, ends_[end].posted.size());
    return true;
  }

  bool carry_out_one(std::size_t end) {
    for (Posted& posted : ends_[end].posted) {
      if (posted.carried_out == posted.list->size()) {
        continue;
      }
      ibv_send_wr request = (*posted.list)[posted.carried_out++];
      expect_lent(end, request);
      Side& to = *ends_[1 - end].side;
      rdma::testing::carry_out(request, to);
      EXPECT_LE(to.arrived.size(), to.protocol->buffer_count()) << "a message that would have found no receive buffer";
      return true;
    }
    return false;
  }

  /// The memory that an adapter touches belongs to an operation that has not ended.
  void expect_lent(std::size_t end, const ibv_send_wr& request) {
    const auto is_lent = [&](std::size_t whose, std::uint64_t address, std::size_t size) {
      const std::uint64_t begin = address_of(ends_[whose].side->memory.data());
      if (address < begin || address >= begin + pages * page) {
        return true;  // a message's slot
      }
      for (std::size_t i = (address - begin) / page; i <= (address - begin + size - 1) / page; ++i) {
        if (!ends_[whose].lent[i]) {
          return false;
        }
      }
      return true;
    };
    std::size_t total = 0;
    for (int i = 0; i < request.num_sge; ++i) {
      EXPECT_TRUE(is_lent(end, request.sg_list[i].addr, request.sg_list[i].length)) << "its owner has it back";
      total += request.sg_list[i].length;
    }
    if (request.opcode != IBV_WR_SEND && total != 0) {
      EXPECT_TRUE(is_lent(1 - end, request.wr.rdma.remote_addr, total)) << "its owner at the peer has it back";
    }
  }

  bool complete(std::size_t end) {
    auto& posted = ends_[end].posted;
    if (posted.empty() || posted.front().carried_out != posted.front().list->size()) {
      return false;
    }
    posted.pop_front();
    ends_[end].side->protocol->completed();
    return true;
  }

  bool receive(std::size_t end) {
    Side& side = *ends_[end].side;
    if (side.arrived.empty()) {
      return false;
    }
    const auto message = std::move(side.arrived.front());
    side.arrived.pop_front();
    EXPECT_EQ(side.protocol->received(message), std::error_code()) << side.protocol->violation();
    return true;
  }

  /// @return the first of `count` pages in `[begin, end)` that nobody has, if they are next.
  static std::optional<std::size_t> lend(End& end, std::size_t& next, std::size_t begin, std::size_t limit,
                                         std::size_t count) {
    if (next + count > limit) {
      next = begin;
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (end.lent[next + i]) {
        return std::nullopt;
      }
    }
    std::fill_n(end.lent.begin() + static_cast<std::ptrdiff_t>(next), count, true);
    next += count;
    return next - count;
  }

  void start(std::size_t end) {
    Active active;
    active.end = end;
    active.count = 1 + dice(6);
    active.outcome = std::make_shared<Outcome>();
    End& own = ends_[end];
    End& peers = ends_[1 - end];
    const auto first = lend(own, own.next_page, 0, own_pages, active.count);
    if (!first) {
      return;
    }
    active.first = *first;
    std::vector<MutableBuffer> objects;
    const std::size_t size = dice(3) == 0 ? 100 : page;
    for (std::size_t i = 0; i < active.count; ++i) {
      objects.push_back(own.side->at((active.first + i) * page, size));
    }
    const std::size_t kind = dice(4);
    if (kind < 2) {
      const auto target = lend(peers, peers.next_target, own_pages, pages, active.count);
      if (!target) {
        std::fill_n(own.lent.begin() + static_cast<std::ptrdiff_t>(active.first), active.count, false);
        return;
      }
      active.target = *target;
      std::vector<std::uint64_t> indexes;
      for (std::size_t i = 0; i < active.count; ++i) {
        indexes.push_back(active.target + i);
      }
      const bool writes = kind == 0;
      fill(writes ? objects : std::vector<MutableBuffer>{peers.side->at(active.target * page, active.count * page)});
      std::vector<std::byte> notification(writes && dice(2) == 0 ? 1 + dice(3000) : 0);
      active.operation = own.side->start(
          one_sided(writes ? TransferKind::write : TransferKind::read, objects, indexes, std::move(notification)),
          active.outcome);
    } else {
      const auto tag = dice(4);
      if (kind == 2) {
        fill(objects);
      }
      // A send and a recv that meet may differ in number and size: then they end with errors.
      active.operation =
          own.side->start(paired(kind == 2 ? TransferKind::send : TransferKind::recv, objects, tag), active.outcome);
    }
    active_.push_back(std::move(active));
  }

  void fill(const std::vector<MutableBuffer>& objects) {
    for (const MutableBuffer object : objects) {
      std::ranges::generate(object, [&] { return static_cast<std::byte>(random_()); });
    }
  }

  void look_at_ends() {
    std::erase_if(active_, [&](const Active& active) {
      if (active.outcome->calls == 0) {
        return false;
      }
      EXPECT_EQ(active.outcome->calls, 1);
      const TransferRequest& request = active.operation->request();
      End& own = ends_[active.end];
      End& peers = ends_[1 - active.end];
      if (!active.outcome->ec) {
        ++succeeded_;
        EXPECT_EQ(active.outcome->count, active.count);
      }
      if (!active.outcome->ec && request.one_sided()) {
        for (std::size_t i = 0; i < active.count; ++i) {
          EXPECT_TRUE(std::ranges::equal(request.objects[i],
                                         peers.side->at((active.target + i) * page, request.objects[i].size())));
        }
      }
      std::fill_n(own.lent.begin() + static_cast<std::ptrdiff_t>(active.first), active.count, false);
      if (request.one_sided()) {
        std::fill_n(peers.lent.begin() + static_cast<std::ptrdiff_t>(active.target), active.count, false);
      }
      return true;
    });
  }

  /// Both queue pairs are destroyed: what is with the adapters is dropped, then everything ends.
  void break_pair() {
    ++breaks_;
    for (End& end : ends_) {
      end.posted.clear();
      end.side->arrived.clear();
    }
    for (End& end : ends_) {
      end.side->protocol->fail(errc::connection_lost, "the dice say so");
    }
    look_at_ends();
    EXPECT_TRUE(active_.empty()) << "stranded by a failure";
    EXPECT_EQ(fences_out_, 0);
    join();
  }

  void finish() {
    work_off();
    // The rest waits for partners.
    for (const Active& active : std::vector<Active>(active_)) {
      active.operation->request_stop(errc::cancelled);
    }
    work_off();
    EXPECT_TRUE(active_.empty()) << "stranded: " << active_.size();
    EXPECT_EQ(fences_out_, 0);
    for (const End& end : ends_) {
      EXPECT_TRUE(end.side->protocol->idle());
      EXPECT_EQ(end.side->protocol->posted(), 0U);
      EXPECT_FALSE(end.side->protocol->draining_since().has_value());
      EXPECT_FALSE(end.side->protocol->unfinished_since().has_value()) << "its peer stopped in the middle of something";
    }
    for (std::size_t end = 0; end < 2; ++end) {
      EXPECT_EQ(ends_[end].side->protocol->credits() + ends_[1 - end].side->protocol->owed(),
                ends_[1 - end].side->protocol->buffer_count())
          << "receive buffers that nobody counts";
    }
  }

  void work_off() {
    for (bool busy = true; busy;) {
      busy = false;
      for (std::size_t end = 0; end < 2; ++end) {
        for (std::size_t which = 0; which < 5; ++which) {
          busy = move(end, which) || busy;
        }
      }
      look_at_ends();
    }
  }

  std::mt19937 random_;
  bool grows_;  ///< Else there is no more memory for messages than there is at first.
  std::array<End, 2> ends_;
  std::vector<Active> active_;
  int fences_out_ = 0;
  std::size_t succeeded_ = 0;
  std::size_t breaks_ = 0;
  std::size_t most_lists_ = 0;
  std::size_t growths_ = 0;
};

TEST(RailProtocolOrder, AnyOrderOfCompletionsEndsEverythingOnceAndTouchesNothingThatHasEnded) {
  std::size_t succeeded = 0;
  std::size_t breaks = 0;
  std::size_t most_lists = 0;
  std::size_t growths = 0;
  for (unsigned seed = 1; seed <= 40 && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Pair pair(seed);
    pair.run(5'000);
    succeeded += pair.succeeded();
    breaks += pair.breaks();
    most_lists = std::max(most_lists, pair.most_lists());
    growths += pair.growths();
  }
  // Else this tests nothing.
  EXPECT_GT(succeeded, 1'000U);
  EXPECT_GT(breaks, 5U);
  EXPECT_GT(most_lists, 2U);
  EXPECT_GT(growths, 40U);
}

}  // namespace
}  // namespace kvferry::rdma::testing
