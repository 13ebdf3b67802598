// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/steady_timer.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/kit/link.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/inbox_driver.hpp>
#include <kvferry/kit/thread_rank.hpp>
#include "device_events.hpp"
#include "queue_pair.hpp"
#include "rail_domain.hpp"
#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

struct RailOptions {
  QueuePairOptions queue_pair;
  std::chrono::milliseconds keepalive_interval{0};
  std::chrono::milliseconds drain_timeout{0};
  std::chrono::milliseconds parts_timeout{60'000};
  std::chrono::microseconds spin{0};
  /// The channel's, so that no rail breaks because there is no descriptor left for one.
  std::shared_ptr<const MemoryLook> look = {};
  /// Of the executor's threads: common to all rails.
  std::shared_ptr<kit::IoThreadRank> io_rank = std::make_shared<kit::IoThreadRank>();
};

/// A port, its device's events, and the domain in which regions are registered there.
struct RailPort {
  std::shared_ptr<RailDevice> device;
  std::shared_ptr<DeviceEvents> events;
  std::shared_ptr<RailDomains> domains;
};

/// The side of a handshake: the dialing one says hello, the accepting one welcome.
enum class Role : std::uint8_t { dialing, accepting };

/// A connection on one rail: a queue pair and the protocol on it. A link may have several on the same rail.
///
/// A thread with work for the rail (a caller with an operation, the reactor with an event, a deadline) drives it, as
/// `InboxDriver` describes. So an operation's requests are posted on the caller's own thread. Only the driver ends
/// operations, when their requests have completed or the queue pair has been destroyed: then their buffers are quiet.
class Rail : public DeviceEvents::Listener, public std::enable_shared_from_this<Rail> {
 public:
  /// The owner of a rail, told when it is usable, and when it breaks by itself.
  class Owner {
   public:
    virtual ~Owner() = default;
    /// The peer has greeted: messages work in both directions. From now on nothing is received until `run`.
    virtual void rail_greeted() = 0;
    /// Called before any operation ends because of it. So a call that is made at such an end finds the peer failed and
    /// reconnects. Must not touch a rail.
    virtual void rail_breaking(std::error_code cause) = 0;
    /// After this rail's operations have ended.
    virtual void rail_broken(std::error_code cause, const std::string& why) = 0;
  };

  /// @param domain of the port, and of all of the link's queue pairs on it. @param number the rail's.
  /// @throws TransferError if there can't be a queue pair.
  Rail(const asio::any_io_executor& executor, const RailPort& port, std::shared_ptr<RailDomain> domain,
       std::size_t number, const RailOptions& options, std::weak_ptr<Owner> owner);

  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;
  ~Rail() override;

  /// Without the keys of regions.
  [[nodiscard]] const RailEndpoint& endpoint() const noexcept { return endpoint_; }
  [[nodiscard]] const std::shared_ptr<RailDomain>& domain() const noexcept { return domain_; }

  /// The peer's rail and its data.
  struct Joint {
    const Endpoint& peer;
    const RailEndpoint& rail;
    std::shared_ptr<LinkRegions> regions;
    std::size_t place = 0;  ///< The rail's, among the link's rails.
  };
  /// Joins the queue pair with the peer's and, on the dialing side, says hello.
  [[nodiscard]] kit::Failure connect(std::shared_ptr<kit::LinkHost> host, const Joint& joint, Role role,
                                     std::uint64_t own_incarnation);
  /// The link has been handed over: welcomes the peer, on the accepting side, and receives. Does nothing if it has been
  /// shut.
  void run();

  /// A leader may sleep on this: it is readable when something has completed. Null if there is nothing to lead.
  using Led = std::optional<std::shared_ptr<const ibv_comp_channel>>;
  /// @param led null, or set as soon as this thread leads the rail, see below.
  void start(std::shared_ptr<kit::StripedOperation> batch, kit::ObjectRange range, Led* led = nullptr);
  void stop(std::shared_ptr<kit::Operation> operation);
  /// See `RailProtocol::fence`.
  void fence(std::function<void()> done);
  /// See `kit::Link`.
  void region_added();
  void region_removed(std::uint32_t number, std::function<void()> done);
  void ask_regions(std::function<void()> done);
  /// Probes the peer's adapter; `answered` is called with the rail's engine held.
  void probe(std::function<void()> answered);
  /// Processes no more completions and messages. Otherwise the peer's answer to the end of another rail of the link
  /// could end this rail's operations before `shut` does.
  void hold();
  enum class Farewell : std::uint8_t { answers, goodbye };
  /// After `hold`: sends the outstanding answers to the peer, in steps that don't wait. From the first step on nothing
  /// new is accepted from it. Call it again when `event_descriptor` is readable.
  /// @return whether the peer's adapter has all of them, or nothing can be sent any more.
  [[nodiscard]] bool say(Farewell what);
  /// Readable when `say` should be called again; -1 if never.
  [[nodiscard]] int event_descriptor();
  /// Destroys the queue pair and ends all operations: with the peer's answer if it has answered, else with `cause`.
  void shut(std::error_code cause, const std::string& why);
  /// After `shut`: the regions that were registered for this link alone are so no more. Takes its time.
  void deregister_own() { domain_->link_ended(); }

  /// @name For a thread that waits until its operation ends, and drives the rail meanwhile: its leader, of which there is one at
  /// a time. As long as it is awake, no other thread waits for completions.
  /// @{
  enum class Found : std::uint8_t {
    nothing,
    something,
    busy,      ///< Another thread drives.
    released,  ///< There is nothing to lead any more.
  };
  /// Posts requests and takes completions. @param may_sleep the leader is going to sleep if this finds nothing: so an event is asked for.
  [[nodiscard]] Found lead(bool may_sleep);
  /// The leader has slept.
  void woken();
  void end_leading();
  /// @}

  void device_failed(std::error_code cause, const std::string& why) override;

  [[nodiscard]] std::string path() const;

 private:
  struct Start {
    std::shared_ptr<kit::StripedOperation> batch;
    kit::ObjectRange range;
    RailProtocol::Preparation preparation;
  };

  struct Inbox {
    std::vector<Start> starts;
    std::vector<std::shared_ptr<kit::Operation>> stops;
    std::vector<std::function<void()>> fences;
    std::vector<std::function<void()>> probes;
    std::vector<std::pair<std::uint32_t, std::function<void()>>> removed_regions;
    std::vector<std::function<void()>> region_questions;
    bool region_added = false;
    std::size_t ended_fences = 0;  ///< So many of the peer's have had their writes end.
    bool event = false;
    bool woken = false;
    bool timer = false;
    bool continuation = false;  ///< What was posted to go on driving has run.
    kit::Failure trouble;       ///< Of the device.

    [[nodiscard]] bool empty() const noexcept {
      return starts.empty() && stops.empty() && fences.empty() && probes.empty() && removed_regions.empty() &&
             region_questions.empty() && !region_added && ended_fences == 0 && !event && !woken && !timer &&
             !continuation && !trouble;
    }
  };

  enum class Phase : std::uint8_t { made, greeting, greeted, running };

  /// Completions that are taken from the queue at a time.
  static constexpr std::size_t poll_batch = 32;
  /// The driver's work before it gives others a turn.
  struct Turn {
    std::size_t rounds = 0;  ///< Of a batch of completions, a list of requests.
    bool checks = false;     ///< Whether it takes and compares checksums, about a mebibyte for either side.
    bool may_sleep = false;  ///< The leader's.
  };
  /// On a caller's own thread: only an operation's first requests, and no work for the peer.
  static constexpr Turn callers_turn{4, false, false};
  /// On the reactor's thread.
  static constexpr Turn full_turn{64, true, false};

  [[nodiscard]] std::shared_ptr<const ibv_comp_channel> begin_leading();
  void drive(Turn turn, Found* found = nullptr);
  /// Drives, on a thread that the executor lends.
  void drive_on_io_thread();
  [[nodiscard]] bool leads() const noexcept { return leader_ == std::this_thread::get_id(); }
  /// @return whether the turn ended with work left.
  bool work(Turn& turn, Inbox& taken);
  void apply(Inbox& taken);
  void apply_regions(Inbox& taken);
  void give_up(Inbox& taken, const char* what);
  void await_writes();
  std::size_t poll_step();
  void catch_up();
  void take_completion(const ibv_wc& completion);
  void take_greeting(const ibv_wc& completion);
  bool post_step();
  bool probe_step();
  bool grow_step();
  void post(const char* what);
  void check_timer();
  void check_parts();
  void arm_timer();
  void wait_for_event();
  [[nodiscard]] bool spins() const;
  [[nodiscard]] kit::Failure prepare(const kit::StripedOperation& batch, kit::ObjectRange range,
                                     RailProtocol::Preparation& preparation) const;
  void settle();
  void post_farewell();
  void fail(std::error_code cause, std::string why, std::uint64_t culprit = 0);
  void end_all(std::error_code cause, std::string why, std::uint64_t culprit);

  const asio::any_io_executor executor_;
  const std::shared_ptr<RailDomain> domain_;
  const std::shared_ptr<DeviceEvents> device_events_;
  const RailOptions options_;

  kit::InboxDriver<Inbox>
      driver_;  ///< Its engine guards everything below, but for what is set before the rail is used.
  std::unique_ptr<QueuePair> pair_;
  const RailEndpoint endpoint_;
  RailEndpoint peers_endpoint_;
  Role role_ = Role::dialing;
  std::uint64_t own_incarnation_ = 0;
  std::uint64_t peers_incarnation_ = 0;
  asio::posix::stream_descriptor events_;
  asio::steady_timer timer_;
  std::shared_ptr<kit::LinkHost> host_;  ///< Once it is being joined, as the protocol.
  std::shared_ptr<LinkRegions> regions_;
  std::optional<RailProtocol> protocol_;
  std::size_t awaited_fences_ = 0;  ///< Of the peer's that have come, the first ones, whose writes are waited for.
  WorkList list_;
  std::vector<std::function<void()>> probes_;  ///< To be posted.
  std::weak_ptr<Owner> owner_;
  std::shared_ptr<Owner> told_owner_;     ///< Kept from `rail_breaking` until `rail_broken`.
  std::shared_ptr<Owner> greeted_owner_;  ///< To be told.
  Phase phase_ = Phase::made;
  bool held_ = false;
  bool leaving_ = false;
  bool speechless_ = false;  ///< Leaving, and the peer can't be told anything any more.
  bool said_goodbye_ = false;
  bool armed_ = false;
  bool continuation_posted_ = false;  ///< One at a time, however many threads stopped with work left.
  bool waiting_ = false;
  std::thread::id leader_;  ///< Of nobody: the rail isn't led.
  bool leader_sleeps_ = false;
  std::uint64_t moves_ = 0;  ///< Completions taken and lists posted, in steps.
  std::optional<kit::Clock::time_point> timer_at_;
  kit::Clock::time_point last_activity_{};
  bool failed_ = false;
  std::error_code failure_;
  std::string failure_why_;
};

}  // namespace kvferry::rdma
