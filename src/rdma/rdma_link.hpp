// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/steady_timer.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <kvferry/kit/link.hpp>
#include <kvferry/kit/serving_place.hpp>

#include "endpoint.hpp"
#include "join_threads.hpp"
#include "rail.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

struct LinkOptions {
  std::uint64_t incarnation = 0;
  std::size_t stripe_threshold = 0;
  std::size_t queue_pairs = 1;  ///< Of each rail, at most.
  std::size_t queue_pair_threshold = 0;
  RailOptions rail;
  /// Where a link that breaks deregisters the regions of its own domains: that takes longer than others on the executor can wait.
  /// Gone with the channel. Empty without `RdmaOptions::isolate_peers`.
  std::weak_ptr<JoinThreads> aside = {};
};

/// The connections to one peer, one for each rail; it exists before they are joined. One-sided operations go over the
/// rails in turn, large ones over all of them. A paired one goes over the rail that its tag selects, the same on both
/// sides, so operations of a tag stay in order. If a rail breaks, the link breaks: the next call makes a new one, of
/// the rails that are active then.
///
/// A rail may have further queue pairs: each is a `Rail` of the same number, in the same domain. They differ from other rails
/// in that only large one-sided operations use them, and that keys are told of rails, not of queue pairs.
class RdmaLink final : public kit::Link, private Rail::Owner, public std::enable_shared_from_this<RdmaLink> {
 public:
  /// Makes queue pairs on each rail that is active now; fewer than there may be if a device, or the process, has no room for
  /// more. @throws TransferError if there is no rail.
  [[nodiscard]] static std::shared_ptr<RdmaLink> create(const asio::any_io_executor& executor,
                                                        const std::vector<RailPort>& ports, const LinkOptions& options);

  /// The endpoint that the peer gets: all rails, or only the joined ones after `join`.
  [[nodiscard]] Endpoint endpoint() const;

  /// Joins the rails with the peer's and greets it. `on_link` gets this link when the peer has greeted on all of them,
  /// or the reason why it hasn't. @throws TransferError, with `on_link` never called, if the endpoint is invalid or
  /// doesn't fit.
  void join(std::shared_ptr<kit::LinkHost> host, const Endpoint& peer, Role role, kit::Clock::time_point deadline,
            kit::LinkHandler on_link);
  /// Gives up joining; does nothing once the link has been handed over.
  void fail(std::error_code cause, const std::string& why);

  void start(std::shared_ptr<kit::Operation> operation) override;
  void stop(std::shared_ptr<kit::Operation> operation) override;
  /// When it returns, no region is registered any more for this link alone.
  void shut(std::error_code cause, const std::string& why) override;
  [[nodiscard]] std::optional<Pause> take_leave() override;
  [[nodiscard]] bool fence(std::function<void()> done) override;
  /// Sends an empty write, which the peer's adapter answers: a stopped process counts as living, a killed one doesn't.
  void probe(std::function<void()> answered) override;
  void region_added() override;
  [[nodiscard]] bool region_removed(std::uint32_t number, std::function<void()> done) override;
  void ask_regions(std::function<void()> done) override;
  /// Called when regions of this side have been deregistered. Breaks the link if the handshake told the peer of one of
  /// them, and the peer was not asked to confirm its removal, because the link wasn't known yet.
  void regions_deregistered();
  /// Of one rail. With several, an operation may need all of them.
  [[nodiscard]] bool begin_serving() override;
  void serve(kit::BlockingWait& wait) override;
  void end_serving() override;
  /// Each queue pair has a channel of events.
  [[nodiscard]] std::size_t descriptors() const noexcept override { return rails_.size(); }
  [[nodiscard]] std::string path() const override;

 private:
  RdmaLink(const asio::any_io_executor& executor, const LinkOptions& options) : options_(options), timer_(executor) {}

  void add_further(const std::vector<RailPort>& ports);
  /// Sets `joined_` and `joined_rails_`, and lets go of further queue pairs that the peer has no counterparts of.
  /// @return what the peer has said of the joined queue pairs, in the same order. @throws TransferError if there is none.
  [[nodiscard]] std::vector<RailEndpoint> pick_joined(const Endpoint& peer, const std::string& who);
  /// Ends joining. @return the handler, if it hasn't been taken yet.
  [[nodiscard]] kit::LinkHandler take_handler(std::shared_ptr<RdmaLink>& kept);
  [[nodiscard]] bool say_farewell(bool& answered);
  [[nodiscard]] std::vector<int> event_descriptors() const;
  void end_rails(std::error_code cause, const std::string& why);
  void deregister_own();
  void deregister_aside();
  void rail_greeted() override;
  void rail_breaking(std::error_code cause) override;
  void rail_broken(std::error_code cause, const std::string& why) override;

  const LinkOptions options_;
  std::vector<std::shared_ptr<Rail>> rails_;  ///< All queue pairs that were made, those of a rail behind its first one.
  /// Those in use: the first ones of all rails, then their second ones, and so on: all rails have as many. Set before the link is
  /// handed over, as the following.
  std::vector<Rail*> joined_;
  std::size_t joined_rails_ = 0;
  std::shared_ptr<kit::LinkHost> host_;
  std::shared_ptr<LinkRegions> regions_;      ///< As the former.
  std::atomic<std::size_t> next_rail_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> has_left_{false};
  std::atomic<bool> deregistering_{false};  ///< Has been handed to `LinkOptions::aside`.
  kit::ServingPlace place_{options_.rail.io_rank};
  Rail::Led led_channel_;                                ///< Of that thread alone; set while it leads the rail.
  std::optional<kit::Clock::time_point> leaving_until_;  ///< For `take_leave` alone.

  std::mutex joining_mutex_;  ///< Guards all below.
  asio::steady_timer timer_;
  kit::LinkHandler on_link_;        ///< Until it has been called.
  std::shared_ptr<RdmaLink> self_;  ///< So long nobody else keeps it.
  std::vector<std::uint32_t> asked_regions_;  ///< That the peer was told of by the handshake and asked to let go of.
  std::size_t greeted_ = 0;
};

}  // namespace kvferry::rdma
