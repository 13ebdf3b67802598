// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>

#include "channel_options.hpp"
#include "memory.hpp"
#include "operation.hpp"
#include "side_message_handler.hpp"

namespace kvferry::python {

/// A channel as Python sees it, with the memory of its regions, and what was taken by calls that were interrupted. To be used
/// with the GIL.
class Channel {
 public:
  /// Of what an operation receives: notifications of a key, 0 for those without one, or news of peers.
  using Kind = std::optional<std::uint64_t>;

  Channel(const std::string& transport, const nb::list& regions, const nb::dict& options, nb::object handler);
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;
  ~Channel();

  [[nodiscard]] BaseTransferChannel& native() const noexcept { return *made_.channel; }
  [[nodiscard]] const Regions& regions() const noexcept { return regions_; }

  std::uint32_t add_region(nb::handle given);
  /// Takes a region out, and keeps its memory until its removal has ended.
  void leave(std::uint32_t number, std::shared_ptr<Operation> removal);
  /// A removal that could not be started.
  void take_back(std::uint32_t number, const std::shared_ptr<Operation>& removal);
  /// References to the memory of regions that have been removed go. Regions whose removal was refused are there again.
  void let_removed_go();

  void answer_side_messages() const;
  /// For calls that block. @throws TransferError errc::would_deadlock
  void check_url(const std::string& url) const;
  [[nodiscard]] SideMessage own_answer(const SideMessage& message) const { return made_.own_answer(message); }

  /// Keeps an operation that had taken something when the call that waited for it was interrupted.
  void leave(std::shared_ptr<Operation> operation);
  /// Moves those that are kept to `left`, as keys, at once: a signal's handler that raises finds each in one of them.
  void take_unclaimed(nb::dict left);
  /// How often something has been kept.
  [[nodiscard]] std::uint64_t kept() const noexcept { return kept_; }
  /// Something has been kept: those who wait for its kind are cancelled, to look for it.
  void look_again(Kind kind);
  /// An operation that is cancelled, to be started anew, if something of its kind is kept meanwhile, which it would not see.
  void begin_receiving(const std::shared_ptr<Operation>& operation, Kind kind);
  /// How many wait for what is kept.
  [[nodiscard]] std::size_t receiving();

  void close();

 private:
  /// A region that is being removed.
  struct Leaving {
    std::optional<Region> region;  ///< Not there: there was none when the removal was started.
    std::vector<std::shared_ptr<Operation>> removals;
  };
  struct Receiving {
    std::weak_ptr<Operation> operation;
    Kind kind;
  };

  void forget_received();

  Regions regions_;
  std::map<std::uint32_t, Leaving> leaving_;
  std::unique_ptr<SideMessageHandler> handler_;
  MadeChannel made_;
  std::vector<std::shared_ptr<Operation>> unclaimed_;
  std::vector<Receiving> receiving_;
  std::uint64_t kept_ = 0;
};

}  // namespace kvferry::python
