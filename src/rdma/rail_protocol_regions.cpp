// SPDX-License-Identifier: Apache-2.0

// Regions that come and go. News go out ahead of what is started here later. A region that is taken back stays registered
// until the peer has confirmed, on each rail, that the adapter is done with all that it had been given by then: no request
// with the region's key is under way, and none will be made.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/kit/region_table.hpp>

#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

std::string gone(std::uint32_t number) { return "the peer has removed its region " + std::to_string(number); }

/// Calls `function` with the number of each region that objects of the range are in, until it returns true.
template <class Function>
bool any_region(const TransferRequest& request, kit::ObjectRange range, Function function) {
  if (!request.one_sided() || range.begin == range.end) {
    return false;
  }
  if (request.remote_ranges.empty()) {
    return function(request.remote_region);
  }
  const auto ranges = std::span(request.remote_ranges).subspan(range.begin, range.end - range.begin);
  return std::ranges::any_of(ranges, function, &RemoteRange::region);
}

}  // namespace

/// Of the regions that a part is for, as far as the peer has them.
kit::Failure RailProtocol::look_up_regions(const TransferRequest& request, kit::ObjectRange range) {
  if (remote_->outdated()) {
    remote_ = regions_->peers();
  }
  const bool checked = request.checksums.value_or(false);
  kit::Failure failure;
  (void)any_region(request, range, [&](std::uint32_t number) {
    if (remote_->find(number) == nullptr) {
      failure = {errc::region_gone, gone(number)};
    } else if (checked && !allows(remote_->find(number)->access, Access::read)) {
      failure = {errc::access_denied, "the peer's region " + std::to_string(number) +
                                          " can't be read, and over RDMA a write's checksums tell of what is there"};
    }
    return static_cast<bool>(failure);
  });
  return failure;
}

void RailProtocol::region_added() {
  if (failed_) {
    return;
  }
  const auto now = host_->local_regions();
  const auto told = std::exchange(told_regions_, nullptr);
  if (told) {
    // Regions that have gone since the handshake, whoever waits for that: nobody here. Ahead of those that have come, so that
    // the peer never has more than there may be.
    for (const LocalRegion& region : told->all()) {
      if (now->find(region.number) == nullptr) {
        tell_removed(region.number, nullptr);
      }
    }
  }
  for (const LocalRegion& region : now->all()) {
    if (region.number >= told_next_region_) {
      tell_added(region);
    }
  }
  if (told && now->next() > told->next() && now->find(now->next() - 1) == nullptr) {
    tell_removed(now->next() - 1, nullptr);  // with it the peer knows how far numbers have come
  }
  told_next_region_ = std::max(told_next_region_, now->next());
}

/// With the keys of all rails, a message for each.
void RailProtocol::tell_added(const LocalRegion& region) {
  const std::size_t before = news_.size();
  for (std::size_t place = 0; place < regions_->rails().size(); ++place) {
    auto keys = regions_->own_keys(place, region.number);
    if (!keys) {
      news_.resize(before);
      // It has gone while this was being said, or the link's end has begun, on another rail: then there is nothing to say.
      if (host_->local_regions()->find(region.number) == nullptr) {
        tell_removed(region.number, nullptr);
      }
      return;
    }
    News& news = news_.emplace_back();
    news.header.type = MessageType::region_added;
    news.header.flags = place + 1 == regions_->rails().size() ? MessageHeader::last : 0;
    news.header.operation = region.number;
    news.header.tag = region.size;
    news.header.first = regions_->rails()[place];
    news.header.status = static_cast<std::uint32_t>(region.peer_access);
    news.header.count = static_cast<std::uint32_t>(keys->keys.size());
    news.page_size = region.page_size;
    news.keys = std::move(*keys);
  }
}

void RailProtocol::region_removed(std::uint32_t number, std::function<void()>&& done) {
  if (failed_) {
    std::exchange(done, nullptr)();
    return;
  }
  region_added();  // what has a smaller number is told first
  tell_removed(number, std::move(done));
}

void RailProtocol::tell_removed(std::uint32_t number, std::function<void()>&& done) {
  removed_.push_back({number, {}});
  removed_.back().done.swap(done);  // before the message: who waits is told if that can't be queued
  News& news = news_.emplace_back();
  news.header.type = MessageType::region_removed;
  news.header.operation = number;
}

void RailProtocol::ask_regions(std::function<void()> done) {
  if (failed_) {
    return;
  }
  MessageHeader header;
  header.type = MessageType::regions_question;
  header.operation = next_id_++;
  own_questions_.emplace(header.operation, std::move(done));
  tell(header);
}

bool RailProtocol::add_news(WorkList& list) {
  if (news_.empty()) {
    return false;
  }
  News& news = news_.front();
  if (news.header.type == MessageType::region_added) {
    const AddedRegion added{news.keys.address, news.keys.slice_bytes, news.page_size};
    const std::size_t bytes_of_keys = news.keys.keys.size() * sizeof(std::uint32_t);
    std::byte* const body = begin_message();
    std::memcpy(body, &added, sizeof(added));
    if (bytes_of_keys != 0) {
      std::memcpy(body + sizeof(added), news.keys.keys.data(), bytes_of_keys);
    }
    news.header.body_bytes = static_cast<std::uint32_t>(sizeof(added) + bytes_of_keys);
  }
  told_removals_ += news.header.type == MessageType::region_removed ? 1 : 0;
  questions_ -= news.header.type == MessageType::regions_answer ? 1 : 0;
  end_message(list, news.header);
  news_.pop_front();
  return true;
}

std::error_code RailProtocol::end_region_added(const MessageHeader& header, std::span<const std::byte> body) {
  const auto& rails = regions_->rails();
  const std::size_t place = coming_.keys.size();
  AddedRegion added;
  if (body.size() < sizeof(added) || header.count > max_region_keys ||
      body.size() != sizeof(added) + header.count * sizeof(std::uint32_t)) {
    return violated("a region with " + std::to_string(header.count) + " keys in " + std::to_string(body.size()) +
                    " bytes");
  }
  std::memcpy(&added, body.data(), sizeof(added));
  RemoteRegion region{header.tag, added.page_size, static_cast<Access>(header.status),
                      static_cast<std::uint32_t>(header.operation)};
  const bool sensible = region.page_size != 0 && region.size != 0 && region.size % region.page_size == 0 &&
                        header.status <= static_cast<std::uint32_t>(Access::read_write) &&
                        header.operation <= kit::RegionTable::max_number && header.first == rails[place] &&
                        ((header.flags & MessageHeader::last) != 0) == (place + 1 == rails.size()) &&
                        (place == 0 || region == coming_region_);
  if (!sensible) {
    return violated("region " + std::to_string(header.operation) + " of " + std::to_string(region.size) +
                    " bytes with pages of " + std::to_string(region.page_size) + " and access " +
                    std::to_string(header.status) + ", its keys on rail " + std::to_string(header.first));
  }
  RegionKeys keys{added.address, added.slice_bytes, std::vector<std::uint32_t>(header.count), region.number};
  if (header.count != 0) {
    std::memcpy(keys.keys.data(), body.data() + sizeof(added), header.count * sizeof(std::uint32_t));
  }
  if (auto wrong = check_region_keys(keys, region); !wrong.empty()) {
    return violated("region " + std::to_string(region.number) + ": " + wrong);
  }
  coming_region_ = region;
  coming_.number = region.number;
  coming_.page_size = region.page_size;
  coming_.access = region.access;
  coming_.keys.push_back(std::move(keys));
  if (coming_.keys.size() != rails.size()) {
    return {};
  }
  if (!regions_->add(std::exchange(coming_, {}), [&] { return host_->peer_region_added(region); })) {
    return violated("more than " + std::to_string(kit::RegionTable::max_regions) + " regions");
  }
  return {};
}

std::error_code RailProtocol::end_region_removed(const MessageHeader& header) {
  if (header.operation > kit::RegionTable::max_number) {
    return violated("region " + std::to_string(header.operation) + " gone");
  }
  if (const auto ec = room_for_answer()) {
    return ec;
  }
  const auto number = static_cast<std::uint32_t>(header.operation);
  regions_->remove(number);
  host_->peer_region_removed(number);
  std::vector<std::uint64_t> cut;
  for (const auto& [id, transfer] : transfers_) {
    if (transfer.state == State::moving &&
        any_region(transfer.request(), transfer.range, [&](std::uint32_t used) { return used == number; })) {
      cut.push_back(id);
    }
  }
  removals_.push_back({number, recorded_});
  for (const std::uint64_t id : cut) {
    end_when_drained(transfers_.at(id), errc::region_gone, gone(number));
  }
  answer_removals();
  return {};
}

/// Answers those removals after which the adapter has completed everything that it had then.
void RailProtocol::answer_removals() {
  while (!removals_.empty() && removals_.front().behind <= completed_) {
    MessageHeader ack;
    ack.type = MessageType::region_removed_ack;
    ack.operation = removals_.front().number;
    tell(ack);
    removals_.pop_front();
  }
}

std::error_code RailProtocol::end_region_removed_ack(const MessageHeader& header) {
  if (told_removals_ == 0 || removed_.front().number != header.operation) {
    return violated("an answer to the removal of region " + std::to_string(header.operation) +
                    ", which is not the next of " + std::to_string(told_removals_));
  }
  --told_removals_;
  const auto done = std::move(removed_.front().done);
  removed_.pop_front();
  if (done) {
    done();
  }
  return {};
}

/// The answer goes out behind the news of all regions that there are by now.
std::error_code RailProtocol::end_regions_question(const MessageHeader& header) {
  if (const auto ec = room_for_answer()) {
    return ec;
  }
  region_added();
  ++questions_;
  News& news = news_.emplace_back();
  news.header.type = MessageType::regions_answer;
  news.header.operation = header.operation;
  return {};
}

std::error_code RailProtocol::end_regions_answer(const MessageHeader& header) {
  auto question = own_questions_.extract(header.operation);
  if (question.empty()) {
    return violated("answer to question " + std::to_string(header.operation) + " for regions, which there wasn't");
  }
  question.mapped()();
  return {};
}

/// The queue pair is gone, and with it all access to this side's regions.
void RailProtocol::fail_regions() {
  news_.clear();
  removals_.clear();
  own_questions_.clear();
  questions_ = 0;
  told_removals_ = 0;
  while (!removed_.empty()) {
    const auto done = std::move(removed_.front().done);
    removed_.pop_front();
    if (done) {
      done();
    }
  }
}

}  // namespace kvferry::rdma
