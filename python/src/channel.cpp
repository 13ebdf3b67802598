// SPDX-License-Identifier: Apache-2.0
#include "channel.hpp"

#include <kvferry/error.hpp>
#include <kvferry/memory_region.hpp>

#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.hpp"
#include "channel_registry.hpp"
#include "released.hpp"

namespace kvferry::python {
namespace {

Channel::Kind kind_received(const Operation::Result& received) {
  if (const auto* one = std::get_if<Notification>(&received)) {
    return one->key;
  }
  const auto* several = std::get_if<std::vector<Notification>>(&received);
  return several != nullptr && !several->empty() ? Channel::Kind(several->front().key) : Channel::Kind();
}

}  // namespace

Channel::Channel(const std::string& transport, const nb::list& regions, const nb::dict& options, nb::object handler) {
  refuse_at_exit();
  ChannelRegistry::destroy_leftovers();
  for (const nb::handle region : regions) {
    regions_.emplace(static_cast<std::uint32_t>(regions_.size()), converted<Region>(region, "a region"));
  }
  if (!handler.is_none()) {
    handler_ = std::make_unique<SideMessageHandler>(std::move(handler));
  }
  made_ = make_channel(transport, options, regions_, handler_.get());
  ChannelRegistry::add(made_.channel);
}

Channel::~Channel() {
  ChannelRegistry::remove(made_.channel);
  if (!made_.channel) {
    return;
  }
  const bool elsewhere = InterpreterExit::is_waited_for;
  {
    const Released released;
    made_.channel->close();
    if (!elsewhere) {
      made_.channel.reset();
    }
  }
  if (elsewhere) {
    ChannelRegistry::leave(std::move(handler_), std::move(made_.channel));
  }
}

std::uint32_t Channel::add_region(nb::handle given) {
  let_removed_go();
  Region region = converted<Region>(given, "a region");
  const std::uint32_t number = [&] {
    const Released released;  // memory is registered
    return native().add_region(region.described);
  }();
  regions_.emplace(number, std::move(region));
  return number;
}

void Channel::leave(std::uint32_t number, std::shared_ptr<Operation> removal) {
  Leaving& leaving = leaving_[number];
  leaving.removals.push_back(std::move(removal));
  if (auto node = regions_.extract(number)) {
    leaving.region = std::move(node.mapped());
  }
}

void Channel::take_back(std::uint32_t number, const std::shared_ptr<Operation>& removal) {
  if (const auto it = leaving_.find(number); it != leaving_.end()) {
    std::erase(it->second.removals, removal);
  }
  let_removed_go();
}

void Channel::let_removed_go() {
  // Code of the regions' exporters may run, and of what programs have operations hold, and call this.
  std::vector<Region> gone;
  std::vector<std::shared_ptr<Operation>> ended;
  for (auto it = leaving_.begin(); it != leaving_.end();) {
    Leaving& leaving = it->second;
    bool removed = false;
    const auto first_ended =
        std::ranges::stable_partition(leaving.removals, [](const auto& operation) { return !operation->look(); });
    for (const auto& operation : first_ended) {
      // Who comes too late has nothing to wait for.
      removed = removed || !operation->end->error || operation->end->error == errc::region_gone;
    }
    ended.insert(ended.end(), std::make_move_iterator(first_ended.begin()), std::make_move_iterator(first_ended.end()));
    leaving.removals.erase(first_ended.begin(), first_ended.end());
    const bool refused = !removed && leaving.removals.empty() && find_region(native().regions(), it->first) != nullptr;
    if (refused && leaving.region) {
      regions_.emplace(it->first, std::move(*leaving.region));
    } else if (removed && leaving.region) {
      gone.push_back(std::move(*leaving.region));
    }
    // One whose removal nobody waits for any more may be in use still: until another call has waited, or `close`.
    const bool over = removed || refused || (leaving.removals.empty() && !leaving.region);
    it = over ? leaving_.erase(it) : std::next(it);
  }
}

void Channel::answer_side_messages() const {
  const Released released;
  made_.answer_side_messages();
}

void Channel::check_url(const std::string& url) const {
  if (made_.would_wait_for_itself && made_.would_wait_for_itself(url)) {
    throw TransferError(errc::would_deadlock,
                        "handle_init_side_msg waits for a message to its own channel, which only it could answer");
  }
}

void Channel::leave(std::shared_ptr<Operation> operation) {
  const Kind kind = kind_received(operation->result);
  unclaimed_.push_back(std::move(operation));
  look_again(kind);
}

void Channel::take_unclaimed(nb::dict left) {
  for (const auto& operation : std::vector(unclaimed_)) {
    left[to_object(operation)] = nb::none();
    std::erase(unclaimed_, operation);
  }
}

void Channel::look_again(Kind kind) {
  ++kept_;
  for (const Receiving& one : receiving_) {
    if (const auto operation = one.operation.lock(); operation && one.kind == kind) {
      operation->handle.cancel();
    }
  }
}

void Channel::begin_receiving(const std::shared_ptr<Operation>& operation, Kind kind) {
  forget_received();
  receiving_.push_back({operation, kind});
}

std::size_t Channel::receiving() {
  forget_received();
  return receiving_.size();
}

void Channel::close() {
  {
    const Released released;
    made_.channel->close();
  }
  // Nobody touches the memory any more. Its exporters' code may run, and call this: not while the maps are looked through.
  std::vector<std::shared_ptr<Memory>> gone;
  for (auto& [number, region] : regions_) {
    gone.push_back(std::move(region.memory));
  }
  const auto left = std::exchange(leaving_, {});
}

void Channel::forget_received() {
  std::erase_if(receiving_, [](const Receiving& one) {
    const auto other = one.operation.lock();
    return !other || other->handle.ended();
  });
}

}  // namespace kvferry::python
