// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/tcp.hpp>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <kvferry/kit/link.hpp>
#include <kvferry/kit/serving_place.hpp>
#include <kvferry/kit/thread_rank.hpp>

#include <kvferry/tcp/hello.hpp>
#include <kvferry/tcp/lane.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// The connections to one peer. One-sided operations go over the lanes in turn, large ones over all of them. A paired
/// one goes over the lane that its tag selects, the same on both sides, so operations of a tag stay in order. If a lane
/// breaks, the link breaks.
class KVFERRY_EXPORT TcpLink final : public kit::Link,
                                     private Lane::Owner,
                                     public std::enable_shared_from_this<TcpLink> {
 public:
  struct Options {
    std::size_t stripe_threshold = 0;
    std::chrono::nanoseconds patience{0};  ///< Of a thread that leads a lane, before it sleeps.
    Lane::Options lane;                    ///< Of all lanes; the traffic is each one's own.
    std::shared_ptr<TrafficOfLanes> traffic = std::make_shared<TrafficOfLanes>();
    std::string path;  ///< Of connections that aren't TCP's: how the bytes travel, for people.
  };

  /// @param connections in the order of their lane numbers, which both sides agree on.
  [[nodiscard]] static std::shared_ptr<TcpLink> create(std::shared_ptr<kit::LinkHost> host,
                                                       std::vector<Lane::Connection> connections, Options options);

  /// Starts receiving and sending; until then operations are only taken. To be called when the link has been handed
  /// over; does nothing if it has been shut meanwhile.
  /// @param welcome the first message on each lane; the link fills in the lane's number.
  void run(std::optional<Hello> welcome = {});

  void start(std::shared_ptr<kit::Operation> operation) override;
  void stop(std::shared_ptr<kit::Operation> operation) override;
  void shut(std::error_code cause, const std::string& why) override;
  /// On all lanes: one of them may be busy.
  void probe(std::function<void()> answered) override;
  [[nodiscard]] bool fence(std::function<void()> done) override;
  [[nodiscard]] std::shared_ptr<const std::atomic<bool>> ended() const noexcept override { return ended_; }
  void region_added() override;
  [[nodiscard]] bool region_removed(std::uint32_t number, std::function<void()> done) override;
  [[nodiscard]] std::optional<Pause> take_leave() override;
  /// True for a read that the caller's thread copies by itself.
  [[nodiscard]] bool ends_at_once(const TransferRequest& request) const noexcept override;
  /// The caller's own thread moves a link of one lane. As many threads as the channel has move several lanes.
  [[nodiscard]] bool begin_serving() override;
  void serve(kit::BlockingWait& wait) override;
  void end_serving() override;
  [[nodiscard]] std::string remote_address() const override {
    return path_.empty() ? lanes_.front()->remote_address() : std::string();
  }
  [[nodiscard]] std::size_t descriptors() const noexcept override {
    return lanes_.size() * lanes_.front()->descriptors();
  }
  [[nodiscard]] bool take_used() noexcept override;
  [[nodiscard]] std::string path() const override;

 private:
  TcpLink(std::shared_ptr<kit::LinkHost> host, const Options& options)
      : host_(std::move(host)),
        stripe_threshold_(options.stripe_threshold),
        patience_(options.patience),
        io_rank_(options.lane.io_rank),
        path_(options.path),
        memory_(options.lane.memory),
        drain_timeout_(options.lane.drain_timeout) {}

  void lane_breaking(std::error_code cause) override;
  void lane_broken(std::error_code cause, const std::string& why) override;
  [[nodiscard]] std::function<void()> when_all_have(std::function<void()> done) const;
  void start_striped(const std::shared_ptr<kit::Operation>& operation, std::size_t total_bytes, bool aside);

  const std::shared_ptr<kit::LinkHost> host_;
  const std::size_t stripe_threshold_;
  const std::chrono::nanoseconds patience_;
  const std::shared_ptr<const kit::IoThreadRank> io_rank_;
  const std::string path_;
  const std::shared_ptr<const PeerMemory> memory_;
  const std::chrono::milliseconds drain_timeout_;
  std::vector<std::shared_ptr<Lane>> lanes_;
  std::optional<kit::Clock::time_point> leaving_until_;  ///< Of the thread that closes.
  std::atomic<std::size_t> next_lane_{0};
  std::atomic<bool> failed_{false};
  const std::shared_ptr<std::atomic<bool>> ended_ = std::make_shared<std::atomic<bool>>(false);
  kit::ServingPlace place_{io_rank_};
  /// Of the thread that serves: nothing until it leads the lane, and when it has left it.
  std::optional<std::shared_ptr<Socket>> led_socket_;
};

}  // namespace kvferry::tcp
