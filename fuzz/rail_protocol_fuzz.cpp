// SPDX-License-Identifier: Apache-2.0
// One end of a rail whose adapter is slow and whose peer says anything: the input is a list of what happens - operations that
// begin and are given up, lists that the adapter takes and completes, messages of the peer's - and after each step no byte
// has changed but those that a message may change, no work request touches memory that isn't lent to its operation, no message
// is sent for which the peer has no buffer, and no operation has ended before the adapter let go of it. Each buffer is an
// allocation of its own, so that AddressSanitizer sees a byte too many.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "fuzz/input.hpp"
#include "fuzz/lent_blocks.hpp"
#include "fuzz/message_types.hpp"
#include "fuzz/rail_model.hpp"
#include "tests/rdma/rail_sides.hpp"

namespace {

using kvferry::MutableBuffer;
using kvferry::TransferKind;
using kvferry::fuzz::Input;
using kvferry::fuzz::require;
using namespace kvferry::rdma;
using namespace kvferry::rdma::testing;

constexpr std::size_t peer_buffers = 8;
constexpr std::size_t own_buffers = 64;
constexpr std::size_t peer_pages = 16;
constexpr std::size_t most_operations = 32;
constexpr std::size_t spare_requests = 2;

struct Lent {
  std::shared_ptr<kvferry::kit::Operation> operation;
  std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>();
  TransferKind kind{};
  std::vector<MutableBuffer> objects;
  std::vector<std::vector<std::byte>> before;
  std::vector<std::uint64_t> pages;
  std::size_t total = 0;
  std::uint64_t tag = 0;
  std::size_t moved = 0;        ///< Bytes by RDMA, of lists that have been completed.
  std::size_t out = 0;          ///< Its requests with the adapter.
  std::uint64_t posted_as = 0;  ///< recv
  bool compared = false;        ///< write, read: it succeeds only if the peer has compared something of it.
  bool seen_ended = false;
};

// A long class: all steps of the input work on this one state.
class Rail {
 public:
  explicit Rail(const std::uint8_t* data, std::size_t size) : input_(data, size) {
    // By the length, so that inputs keep their meaning.
    if (size % 2 != 0) {
      own_.first_buffers = min_first_messages;
      own_.most_slots = 4 * slot_count;
      peer_.first_buffers = min_first_messages;
      credits_ = min_first_messages;
    }
    own_.join(peer_);
  }

  void run() {
    while (!input_.empty() && !failed_) {
      step();
      check();
    }
    fail(kvferry::errc::connection_lost);
    check();
    for (const auto& lent : operations_) {
      require(lent->outcome->calls == 1, "each operation ends once");
    }
    require(own_.protocol->idle(), "nothing is left of an operation");
    require(fences_out_ == 0, "each fence and each removal of a region ends");
  }

 private:
  /// The part of a list that the adapter has.
  struct Posted {
    struct Request {
      Lent* lent = nullptr;
      std::size_t bytes = 0;
      const std::byte* slot = nullptr;
      std::vector<std::byte> message;
    };
    std::vector<Request> requests;
  };

  void step() {
    switch (input_.choice(12)) {
      case 0: start(); break;
      case 1:
        if (!operations_.empty()) {
          operations_[input_.choice(operations_.size())]->operation->request_stop(kvferry::errc::cancelled);
        }
        break;
      case 2: fence(); break;
      case 3:
        if (own_.protocol->fill_probe(list_)) {
          post();
        }
        break;
      case 4: complete(); break;
      case 5:
        if (own_.protocol->cut_off(kvferry::kit::Clock::now())) {
          fail(kvferry::errc::connection_lost);
        }
        break;
      case 6: leave(); break;
      case 7: fill(); break;
      case 8:
        grow();
        fill();
        break;
      default: hear(); break;
    }
  }

  void start() {
    if (operations_.size() == most_operations) {
      return;
    }
    constexpr std::array<std::size_t, 8> sizes{0, 1, 100, eager_bytes, eager_bytes + 1, 1500, page - 1, page};
    constexpr std::array kinds{TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv};
    auto lent = std::make_unique<Lent>();
    lent->kind = kinds[input_.choice(kinds.size())];
    const std::size_t count = 1 + input_.choice(12);
    const std::uint8_t how = input_.number();
    const bool open = (how & 1) != 0;
    for (std::size_t i = 0; i < count; ++i) {
      const auto object = blocks_.lend(open, sizes[input_.choice(sizes.size())]);
      if (!object) {
        return;
      }
      lent->objects.push_back(*object);
      lent->total += object->size();
      lent->pages.push_back(input_.choice(peer_pages));
    }
    lent->before = contents(lent->objects);
    lent->tag = input_.choice(4);
    auto request = lent->kind == TransferKind::write || lent->kind == TransferKind::read
                       ? one_sided(lent->kind, lent->objects, lent->pages)
                       : paired(lent->kind, lent->objects, lent->tag);
    if (lent->kind == TransferKind::write && input_.flag()) {
      request.notification.resize(1 + input_.number() * 16U);
    }
    request.checksums = (how & 2) != 0;
    const std::set<std::uint64_t> distinct(lent->pages.begin(), lent->pages.end());
    lent->compared = (how & 2) != 0 && request.one_sided() && lent->total != 0 && distinct.size() == count;
    Lent* const started = lent.get();
    operations_.push_back(std::move(lent));
    started->operation = own_.start(std::move(request), started->outcome);
  }

  void fence() {
    ++fences_out_;
    if (input_.flag()) {
      own_.protocol->fence([this] { --fences_out_; });
    } else {
      own_.protocol->region_removed(1, [this] { --fences_out_; });
    }
  }

  void fill() {
    own_.protocol->begin_fences(own_.protocol->fences_asked());
    (void)own_.protocol->check_step();
    if (own_.protocol->fill(list_)) {
      post();
    }
  }

  void grow() {
    const bool wanted = own_.protocol->wants_slots() || own_.protocol->wants_buffers();
    if (wanted && input_.choice(16) == 15) {
      own_.protocol->stay_small();  // there is no memory
    }
    const std::size_t slots = own_.protocol->slot_count();
    const std::size_t buffers = own_.protocol->buffer_count();
    const bool grew = own_.grow();
    require(grew == (own_.protocol->slot_count() + own_.protocol->buffer_count() > slots + buffers),
            "what a side wants it may have");
    require(own_.protocol->slot_count() <= own_.most_slots, "slots are bounded");
    require(own_.protocol->buffer_count() <= own_buffers, "receive buffers are bounded");
    posted_anew_ += own_.protocol->buffer_count() - buffers;
  }

  void leave() {
    leaving_ = true;
    own_.protocol->leave();
    if (own_.protocol->fill_answers(list_)) {
      post();
    }
  }

  void post() {
    (void)list_.finish();
    require(own_.protocol->posted() <= queue_depth + spare_requests, "the queue has room");
    Posted posted;
    for (std::size_t i = 0; i < list_.size(); ++i) {
      posted.requests.push_back(look_at(list_[i]));
    }
    posted_.push_back(std::move(posted));
  }

  Posted::Request look_at(const ibv_send_wr& request) {
    Posted::Request seen;
    for (int i = 0; i < request.num_sge; ++i) {
      const ibv_sge& piece = request.sg_list[i];
      seen.bytes += piece.length;
      if (request.opcode == IBV_WR_SEND) {
        const auto* const slot = reinterpret_cast<const std::byte*>(piece.addr);
        require(own_.slot_key(piece.addr, piece.length) == piece.lkey, "messages lie in slots, whose keys they have");
        seen.slot = slot;
        seen.message.assign(slot, slot + piece.length);
      } else if (piece.length != 0) {
        Lent* const owner = owner_of(piece);
        require(owner != nullptr, "a work request's memory is lent");
        require(seen.lent == nullptr || seen.lent == owner, "a work request is of one operation");
        seen.lent = owner;
      }
    }
    if (request.opcode == IBV_WR_SEND) {
      tell(seen.message);
    } else if (seen.bytes != 0) {
      require((seen.lent->kind == TransferKind::read) == (request.opcode == IBV_WR_RDMA_READ), "reads read");
      require(may_reach(*seen.lent, request.wr.rdma.remote_addr, seen.bytes, request.wr.rdma.rkey),
              "a work request reaches what the peer named");
      ++seen.lent->out;
    }
    return seen;
  }

  Lent* owner_of(const ibv_sge& piece) {
    require(blocks_.key_of(piece.addr, piece.length) == piece.lkey, "the key is the memory's");
    for (const auto& lent : operations_) {
      for (const MutableBuffer object : lent->objects) {
        const std::uint64_t begin = address_of(object.data());
        if (lent->outcome->calls == 0 && piece.addr >= begin && piece.addr + piece.length <= begin + object.size()) {
          return lent.get();
        }
      }
    }
    return nullptr;
  }

  bool may_reach(const Lent& lent, std::uint64_t address, std::size_t size, std::uint32_t key) {
    if (lent.kind == TransferKind::send) {
      for (const PostedBuffer& buffer : heard_buffers_) {
        if (buffer.direct != 0 && buffer.key == key && address - buffer.address <= buffer.size &&
            size <= buffer.size - (address - buffer.address)) {
          return true;
        }
      }
      return false;
    }
    const std::uint64_t begin = address_of(peer_.memory.data());
    if (key != 1 || address < begin || address + size > begin + peer_.memory.size()) {
      return false;
    }
    for (std::uint64_t at = address - begin; at < address - begin + size; at += page - at % page) {
      if (std::ranges::find(lent.pages, at / page) == lent.pages.end()) {
        return false;
      }
    }
    return true;
  }

  /// A message goes to the peer, who then knows what is in it.
  void tell(std::span<const std::byte> message) {
    MessageHeader header;
    require(message.size() >= sizeof(header), "a message has a header");
    std::memcpy(&header, message.data(), sizeof(header));
    require(header.body_bytes == message.size() - sizeof(header), "a message is as long as it says");
    require(credits_ > 0, "the peer has a buffer for each message");
    --credits_;
    require(header.credits <= posted_anew_, "the peer is told of no buffer that isn't there");
    posted_anew_ -= header.credits;
    known_.push_back(header.operation);
    known_.push_back(header.tag);
    if (header.type == MessageType::send_data) {
      expect_fitting(header, message.subspan(sizeof(header)));
    }
    if (header.type == MessageType::recv_post && !model_.knows(header.operation)) {
      for (const auto& lent : operations_) {
        if (lent->kind == TransferKind::recv && lent->posted_as == 0 && lent->tag == header.tag &&
            lent->outcome->calls == 0 && lent->objects.size() == header.total) {
          lent->posted_as = header.operation;
          model_.posted(header.operation, contents(lent->objects));
          break;
        }
      }
    }
  }

  /// A message for a recv fits the buffers that the peer named, or says that it doesn't.
  void expect_fitting(const MessageHeader& header, std::span<const std::byte> body) {
    const auto sizes = heard_recvs_.find(header.operation);
    if (sizes == heard_recvs_.end()) {
      return;  // its buffers came in parts
    }
    auto& [object, offset] = sent_[header.tag];
    for (std::uint32_t i = 0; i < header.count; ++i) {
      std::uint64_t entry = 0;
      require(body.size() >= sizeof(entry) && object < sizes->second.size(), "an object has a buffer");
      std::memcpy(&entry, body.data(), sizeof(entry));
      body = body.subspan(sizeof(entry));
      const std::uint64_t length = entry & SentObject::length_mask;
      require((entry & SentObject::refused) != 0 || offset + length <= sizes->second[object],
              "an object fits its buffer");
      const bool follows = (entry & (SentObject::refused | SentObject::direct)) == 0;
      require(!follows || length <= body.size(), "an object's bytes follow");
      body = body.subspan(follows ? static_cast<std::size_t>(length) : 0);
      offset += length;
      if ((entry & SentObject::continues) == 0 || !follows) {
        ++object;
        offset = 0;
      }
    }
  }

  void complete() {
    if (posted_.empty()) {
      return;
    }
    for (const auto& request : posted_.front().requests) {
      require(request.slot == nullptr ||
                  std::ranges::equal(request.message, std::span(request.slot, request.message.size())),
              "a message is left alone while the adapter has it");
      if (request.lent != nullptr) {
        require(request.lent->outcome->calls == 0, "an operation lives as long as the adapter has its memory");
        request.lent->moved += request.bytes;
        --request.lent->out;
      }
    }
    posted_.pop_front();
    own_.protocol->completed();
  }

  std::uint64_t some_id() {
    const std::size_t which = input_.number();
    if (which < 192 && !known_.empty()) {
      return known_[known_.size() - 1 - which % known_.size()];
    }
    return which < 240 ? which % 16 : input_.any_number();
  }

  std::vector<std::byte> body_of(MessageHeader& header) {
    std::vector<std::byte> body;
    const auto append = [&](const auto& value) {
      const auto bytes = std::as_bytes(std::span(&value, 1));
      body.insert(body.end(), bytes.begin(), bytes.end());
    };
    header.count = input_.choice(8) == 7 ? static_cast<std::uint32_t>(input_.any_number())
                                         : static_cast<std::uint32_t>(input_.choice(5));
    for (std::size_t i = 0; i < std::min<std::size_t>(header.count, 5); ++i) {
      if (header.type == MessageType::recv_post) {
        PostedBuffer buffer;
        buffer.size = input_.flag() ? page : input_.any_number();
        buffer.address = input_.any_number();
        buffer.key = input_.number();
        buffer.direct = input_.number() & 1;
        append(buffer);
        heard_buffers_.push_back(buffer);
      } else if (header.type == MessageType::send_data) {
        const std::uint64_t flags = std::uint64_t{input_.choice(8)} << 61;
        const std::uint64_t length = input_.flag() ? input_.choice(128) : input_.any_number() & SentObject::length_mask;
        append(flags | length);
        if ((flags & (SentObject::refused | SentObject::direct)) == 0) {
          body.resize(body.size() + std::min<std::size_t>(length, 700), static_cast<std::byte>(0x80 | body.size()));
        }
      } else if (header.type == MessageType::check_memory) {
        CheckedRange range;
        range.offset = input_.flag() ? input_.number() : input_.any_number();
        range.size = input_.flag() ? input_.number() : input_.any_number();
        range.stride = input_.flag() ? range.size + input_.number() : input_.any_number();
        range.region = static_cast<std::uint32_t>(input_.choice(4) == 3 ? input_.any_number() : 0);
        range.count = static_cast<std::uint32_t>(input_.flag() ? 1 : input_.any_number());
        append(range);
      } else if (header.type == MessageType::check_recv) {
        append(CheckedPart{input_.flag() ? input_.choice(128) : input_.any_number(), input_.any_number()});
      }
    }
    if (header.type == MessageType::notify) {
      body.resize(input_.number() * 4U);
    }
    if (header.type == MessageType::region_added) {
      append(AddedRegion{input_.any_number(), input_.flag() ? page : input_.any_number(), page});
      body.resize(sizeof(AddedRegion) + std::min<std::size_t>(header.count, 5) * sizeof(std::uint32_t));
    }
    return body;
  }

  void hear() {
    std::vector<std::byte> message;
    if (input_.choice(16) == 0) {
      message = input_.bytes(input_.number());
    } else {
      MessageHeader header;
      const std::size_t type = input_.choice(message_types.size() + 1);
      header.type = type == 0 ? MessageType{} : message_types[type - 1];
      header.flags = input_.number() & (MessageHeader::last | MessageHeader::checked);
      // As many as there are to be posted anew, mostly.
      header.credits = static_cast<std::uint16_t>(input_.flag() ? peer_buffers - credits_ : input_.choice(4));
      header.operation = some_id();
      header.tag = input_.flag() ? input_.choice(4) : some_id();
      header.first = input_.flag() ? 0 : input_.any_number();
      header.status = input_.flag() ? 0 : input_.number();
      const auto body = body_of(header);
      header.total = input_.flag()
                         ? (header.type == MessageType::notify ? static_cast<std::uint32_t>(body.size()) : header.count)
                         : static_cast<std::uint32_t>(input_.any_number());
      if (header.type == MessageType::recv_post) {
        std::vector<std::uint64_t> sizes;
        for (std::size_t i = 0; i < body.size() / sizeof(PostedBuffer); ++i) {
          sizes.push_back(heard_buffers_[heard_buffers_.size() - body.size() / sizeof(PostedBuffer) + i].size);
        }
        if (header.first == 0 && header.total == sizes.size() && !heard_ids_.contains(header.operation)) {
          heard_recvs_.emplace(header.operation, std::move(sizes));
        } else {
          heard_recvs_.erase(header.operation);
        }
        heard_ids_.insert(header.operation);
      }
      header.body_bytes = static_cast<std::uint32_t>(body.size()) + (input_.choice(32) == 31 ? 1U : 0U);
      const auto bytes = std::as_bytes(std::span(&header, 1));
      message.assign(bytes.begin(), bytes.end());
      message.insert(message.end(), body.begin(), body.end());
    }
    message.resize(std::min(message.size(), small_message));
    message.shrink_to_fit();  // a receive buffer ends where the message does
    note_answer(message);
    std::optional<RailModel> before;
    if (!leaving_ && RailModel::concerns(message)) {
      before = model_;
      model_.read(message);
    }
    ++posted_anew_;  // its buffer was, before it was handed on
    const auto error = own_.protocol->received(message);
    if (error) {
      allow_part_of(before.value_or(model_));
      require(error == kvferry::errc::peer_closed || !own_.protocol->violation().empty(), "a violation is explained");
      fail(error);
    }
  }

  /// Of a message that breaks the rail any part may have been taken.
  void allow_part_of(const RailModel& before) {
    for (const auto& lent : operations_) {
      for (std::size_t i = 0; lent->posted_as != 0 && !lent->seen_ended && i < lent->objects.size(); ++i) {
        const auto& was = before.buffers(lent->posted_as)[i];
        const auto& will_be = model_.buffers(lent->posted_as)[i];
        for (std::size_t at = 0; at < was.size(); ++at) {
          require(lent->objects[i][at] == was[at] || lent->objects[i][at] == will_be[at],
                  "a recv's buffers have what the peer's messages say");
        }
      }
      if (lent->kind == TransferKind::recv && !lent->seen_ended) {
        lent->before = contents(lent->objects);
      }
    }
  }

  /// Counts what the peer may have said truly.
  void note_answer(std::span<const std::byte> message) {
    MessageHeader header;
    if (message.size() < sizeof(header)) {
      return;
    }
    std::memcpy(&header, message.data(), sizeof(header));
    credits_ += header.credits;  // too many: the rail breaks
    if (header.status == 0) {
      send_acks_ += header.type == MessageType::send_ack ? 1 : 0;
      notify_acks_ += header.type == MessageType::notify_ack ? 1 : 0;
      check_answers_ += header.type == MessageType::check_answer ? 1 : 0;
    }
  }

  /// The queue pair is destroyed, and with it all that the adapter has.
  void fail(std::error_code cause) {
    for (const auto& posted : posted_) {
      for (const auto& request : posted.requests) {
        if (request.lent != nullptr) {
          --request.lent->out;
        }
      }
    }
    posted_.clear();
    failed_ = true;
    own_.protocol->fail(cause, "the input says so");
  }

  void check() {
    std::size_t notified = 0;
    std::size_t sent = 0;
    std::size_t compared = 0;
    for (const auto& lent : operations_) {
      require(lent->outcome->calls <= 1, "an operation ends once");
      const bool ended = lent->outcome->calls == 1;
      const bool good = ended && !lent->outcome->ec;
      require(!ended || lent->out == 0, "an operation ends when the adapter has let go of it");
      if (lent->posted_as != 0) {
        if (!lent->seen_ended && !failed_) {
          require(equal(lent->objects, model_.buffers(lent->posted_as)),
                  "a recv's buffers have what the peer's messages say");
          lent->before = contents(lent->objects);
        }
      }
      // A recv that the peer hasn't been told of may have been guessed.
      if (lent->posted_as == 0 && lent->kind == TransferKind::recv && !lent->seen_ended) {
        lent->before = contents(lent->objects);
      }
      require(equal(lent->objects, lent->before), "no byte of an operation's changes that may not");
      lent->seen_ended = ended;
      if (good && (lent->kind == TransferKind::write || lent->kind == TransferKind::read)) {
        const bool notifies = !lent->operation->request().notification.empty();
        // An answer to what came behind the data tells of the data, too, where a failure took the completion.
        require(lent->moved == lent->total || (notifies && failed_), "all of what succeeds has been moved");
        notified += notifies ? 1 : 0;
        compared += lent->compared ? 1 : 0;
      }
      sent += good && lent->kind == TransferKind::send ? 1 : 0;
    }
    require(notified <= notify_acks_, "a notification succeeds when the peer says so");
    require(sent <= send_acks_, "a send succeeds when the peer says so");
    require(compared <= check_answers_, "what has checksums succeeds when the peer has compared them");
    for (const auto& notification : own_.host->notifications) {
      require(!notification.empty() && notification.size() <= max_notification_bytes, "notifications are bounded");
    }
  }

  Input input_;
  Side peer_{peer_pages, peer_buffers};
  Side own_{1, own_buffers};
  LentBlocks blocks_{own_.table, 28};
  std::vector<std::unique_ptr<Lent>> operations_;
  WorkList list_;
  std::deque<Posted> posted_;
  std::vector<std::uint64_t> known_;
  std::vector<PostedBuffer> heard_buffers_;
  std::set<std::uint64_t> heard_ids_;
  std::map<std::uint64_t, std::vector<std::uint64_t>> heard_recvs_;      ///< Sizes, by recv.
  std::map<std::uint64_t, std::pair<std::size_t, std::uint64_t>> sent_;  ///< Object and offset, by send.
  RailModel model_;
  std::size_t credits_ = peer_buffers;
  std::size_t posted_anew_ = 0;  ///< Own receive buffers, or posted in addition, of which the peer hasn't been told.
  std::size_t send_acks_ = 0;
  std::size_t notify_acks_ = 0;
  std::size_t check_answers_ = 0;
  int fences_out_ = 0;
  bool failed_ = false;
  bool leaving_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Rail(data, size).run();
  return 0;
}
