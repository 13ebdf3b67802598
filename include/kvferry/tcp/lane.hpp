// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/tcp.hpp>
#include <asio/steady_timer.hpp>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/kit/link.hpp>
#include <kvferry/kit/poller.hpp>
#include <kvferry/kit/thread_rank.hpp>

#include <kvferry/kit/inbox_driver.hpp>
#include <kvferry/tcp/lane_protocol.hpp>
#include <kvferry/tcp/lane_traffic.hpp>
#include <kvferry/tcp/socket.hpp>
#include <kvferry/tcp/socket_events.hpp>
#include <kvferry/tcp/tls_stream.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// How many bytes an encrypted connection decrypts before it places them (like the read-ahead of `FrameReader`): a few
/// records, so that the system call for them costs little.
inline constexpr std::size_t encrypted_read_ahead = std::size_t{64} << 10;

/// Blocking calls that have to follow each other at once before another one is expected.
inline constexpr std::uint64_t shortest_row = 64;

/// A data connection: a socket and the protocol on it.
///
/// A thread with work for the lane (a caller with an operation, the reactor with an event, a deadline) drives it, as
/// `InboxDriver` describes. So an operation's first bytes leave on the caller's own thread, without waking another.
/// Only the driver touches buffers: when it ends an operation, they are quiet.
///
/// One of three waits for the lane's next bytes: the thread of a blocking call that leads the lane, else a polling I/O
/// thread that watches it, else an event for which it is armed. Only one at a time, so that none wakes or delays
/// another. Between blocking calls that follow each other at once nobody does, for a moment: see `leave_unattended`.
class KVFERRY_EXPORT Lane final : public kit::Pollable, public SocketEvents::Listener, public std::enable_shared_from_this<Lane> {
 public:
  struct Options {
    std::chrono::milliseconds drain_timeout{0};
    std::shared_ptr<SocketEvents> events;
    std::shared_ptr<kit::Poller> poller;  ///< May be null.
    std::shared_ptr<LaneTraffic> traffic = std::make_shared<LaneTraffic>();
    /// May be null: then missing memory ends the process.
    std::shared_ptr<ReadAheadPool> buffers = nullptr;
    std::chrono::milliseconds frame_timeout{60'000};
    std::shared_ptr<PeerMemory> memory = nullptr;  ///< See `LaneProtocol`.
    /// Of the executor's threads: common to all lanes.
    std::shared_ptr<kit::IoThreadRank> io_rank = std::make_shared<kit::IoThreadRank>();
  };

  /// A connection, with what its ends are called in errors.
  struct Connection {
    asio::any_io_executor executor;
    std::shared_ptr<Socket> socket;
    std::string local;
    std::string remote;
    std::string congestion_control = {};
    std::string encryption = {};  ///< The cipher's name; empty: not encrypted.
  };

  /// The owner of a lane, told when its connection breaks by itself.
  class Owner {
   public:
    virtual ~Owner() = default;
    /// Called before any operation ends because of it. So a call that is made at such an end finds the peer failed and
    /// reconnects. Must not touch a lane.
    virtual void lane_breaking(std::error_code cause) = 0;
    /// Called after this lane's operations have ended.
    virtual void lane_broken(std::error_code cause, const std::string& why) = 0;
  };

  Lane(Connection connection, std::shared_ptr<kit::LinkHost> host, Options options, std::weak_ptr<Owner> owner);
  Lane(asio::ip::tcp::socket socket, std::shared_ptr<kit::LinkHost> host, Options options, std::weak_ptr<Owner> owner);

  /// Starts receiving and sending, unless the lane has been shut; until then it only takes operations.
  /// @param first the bytes to send before anything else.
  void run(std::span<const std::byte> first);
  /// @param led null, or the calling thread leads the lane from here on, as after `begin_leading`, whose result this gets.
  void start(std::shared_ptr<StripedOperation> batch, ObjectRange range,
             std::optional<std::shared_ptr<Socket>>* led = nullptr);
  /// The same, for a thread that isn't to drive the lane: one of the executor's does. There is no such form of what follows: it is
  /// rare, or somebody relies on its having been done.
  void start_aside(std::shared_ptr<StripedOperation> batch, ObjectRange range);
  void stop(std::shared_ptr<kit::Operation> operation);
  /// Asks the peer whether it lives; `answered` is called with the lane's engine held.
  void probe(std::function<void()> answered);
  /// See `LaneProtocol::fence`.
  void fence(std::function<void()> done);
  /// See `LaneProtocol::region_added`.
  void region_added();
  /// See `LaneProtocol::region_removed`.
  void region_removed(std::uint32_t number, std::function<void()> done);
  /// Moves bytes without waiting.
  /// @param more whether there is something to move already.
  /// @return null if nothing is under way and the peer waits for no answer; else the socket to watch before the next
  ///   call.
  [[nodiscard]] std::shared_ptr<Socket> take_leave(bool& more);
  /// Ends all operations with `cause`; afterwards nothing touches a buffer or region. The socket stays open: otherwise
  /// the peer's answer to its end could reach another lane of the link before that lane is shut as well.
  void shut(std::error_code cause, const std::string& why);
  /// Closes the socket of a lane that has been shut.
  void disconnect();
  /// The peer has closed another connection of the link. Its earlier answers may still come here, so the lane goes on
  /// until it finds the end of its own connection, at most for the drain time-out. Until then it keeps its owner, so
  /// that `shut` reaches the lane, and doesn't tell the owner.
  void outlive(std::shared_ptr<Owner> owner, std::error_code cause, const std::string& why);

  /// @name For a thread that looks at the lane itself. One at a time.
  /// @{

  /// From now on arriving bytes wake no thread. @return the socket to watch; null if there is none any more.
  [[nodiscard]] std::shared_ptr<Socket> begin_leading();
  /// @param may_wait whether the thread waits for the socket's events next, if this check finds nothing.
  [[nodiscard]] Found lead(bool may_wait = false);
  /// The same, by a thread that doesn't lead any more once its wait is over.
  /// @param left becomes true then, and the lane is left as by `end_leading`.
  [[nodiscard]] Found lead(bool may_wait, const kit::BlockingWait& wait, bool& left);
  /// The socket had something.
  void woken();
  /// Whether a thread has to announce that it is going to wait: see `Socket::may_wait`.
  [[nodiscard]] bool hears_bells() const noexcept { return hears_bells_; }
  /// Whether the lane waits for room to send.
  [[nodiscard]] bool wants_to_send() const noexcept { return wants_to_send_; }
  void end_leading();
  /// @}

  Found poll() override;
  void rest() override;
  void socket_ready(bool readable, bool writable, bool broken) override;

  /// Whether either side has ever started an operation.
  [[nodiscard]] bool take_used() noexcept { return protocol_.take_used(); }
  [[nodiscard]] std::string local_address() const { return local_; }
  [[nodiscard]] std::string remote_address() const { return remote_; }
  [[nodiscard]] std::string congestion_control() const { return congestion_control_; }
  [[nodiscard]] std::string encryption() const { return encryption_; }
  [[nodiscard]] std::size_t descriptors() const noexcept { return descriptors_; }

 private:
  struct Start {
    std::shared_ptr<StripedOperation> batch;
    ObjectRange range;
  };

  struct Inbox {
    std::vector<Start> starts;
    std::vector<std::shared_ptr<kit::Operation>> stops;
    std::vector<std::function<void()>> probes;
    std::vector<std::function<void()>> fences;
    std::vector<std::pair<std::uint32_t, std::function<void()>>> removed_regions;
    bool region_added = false;
    bool readable = false;
    bool writable = false;
    bool broken = false;
    bool drain_expired = false;
    bool frame_expired = false;
    bool rest = false;
    bool attend = false;
    bool writes_ended = false;  ///< For which the peer's fence waits.
  };

  enum class Role { visitor, leader, waiting_leader, leaving };

  /// Work for when the engine has been let go.
  struct Driven {
    bool more = false;
    std::shared_ptr<Owner> told_owner;
    std::shared_ptr<Owner> kept_owner;  ///< To be forgotten.
  };

  enum class Step { progress, blocked, nothing };

  /// Changes what the driver guards, and drives.
  template <class Change>
  void change(Change change_engine, std::size_t budget);
  void drive(std::size_t budget);
  /// Drives, on a thread that the executor lends.
  void drive_on_io_thread();
  /// How a thread drives that has `budget` for its first turn, and does `first` with the engine held, before it moves
  /// anything. @param with calls the driver with a step, and with what is done when the engine has been let go.
  template <class First, class With>
  void drive(std::size_t budget, First first, With with, bool* may_go_on = nullptr);
  void take(std::optional<Inbox> taken);
  /// @param may_go_on when the budget is used up, with that of a turn, if this is a thread of the executor; is cleared then.
  [[nodiscard]] Driven work(std::size_t& budget, bool* may_go_on = nullptr);
  [[nodiscard]] Driven done(bool more);
  /// With the engine let go. @return whether this thread goes on.
  [[nodiscard]] bool let_go(const Driven& driven);
  /// Drives, having looked for bytes whether or not any were announced, unless `released()`. Leaves the lane if `over()`.
  template <class Released, class Over>
  [[nodiscard]] Found look(Role role, Released released, Over over, bool& left);
  void become_leader();
  void leave_lead();
  /// @return whether the budget ran out with work left.
  bool move_bytes(std::size_t& budget, Role role = Role::visitor);
  void apply(Inbox taken);
  Step send_step(std::size_t& budget);
  [[nodiscard]] bool keep_to_room(std::span<iovec>& pieces);
  /// With the cause in errno.
  Step send_failed();
  Step receive_step(std::size_t& budget);
  Step copy_step(std::size_t& budget);
  [[nodiscard]] bool receives_again(std::size_t& budget);
  /// @return false if there is something to move already.
  [[nodiscard]] bool wait_for_more(Role role);
  [[nodiscard]] bool may_wait();
  void arm(std::uint32_t events);
  /// For the thread that has just led the lane: whether nobody need wait for its next bytes, because the next call is expected
  /// at once. A timer has the lane attended to if it doesn't come.
  ///
  /// Arming the socket and taking that back are two system calls around each blocking call. It can't stay armed while it is
  /// led: each answer would wake an I/O thread beside the thread that takes it. So after many calls in a row the lane is left
  /// as it is, up to `longest_unattended`, which what the peer begins just then may have to wait; often enough in vain, and it
  /// takes longer rows.
  [[nodiscard]] bool leave_unattended();
  void attend();
  void close_socket();
  void update_drain_timer();
  void update_frame_timer();
  void stop_operations(const std::vector<std::shared_ptr<kit::Operation>>& operations);
  void drain_expired();
  void frame_expired();
  void await_writes();
  void announce_failure(std::error_code cause);
  void fail(std::error_code cause, std::string why);
  /// Most likely memory is used up: it takes none.
  void fail_for(const std::exception& error);
  void end_all(std::error_code cause, std::string why);

  const std::string local_;
  const std::string remote_;
  const std::string congestion_control_;
  const std::string encryption_;
  const bool by_cpu_;  ///< See `Socket::by_cpu`.
  const bool hears_bells_;  ///< See `Socket::hears_bells`.
  const std::size_t descriptors_;
  const Options options_;
  const asio::any_io_executor executor_;
  const std::shared_ptr<kit::LinkHost> host_;

  kit::InboxDriver<Inbox> driver_;  ///< Its engine guards everything below.
  std::shared_ptr<Socket> socket_;  ///< Null when closed.
  asio::steady_timer drain_timer_;
  LaneProtocol protocol_;
  std::weak_ptr<Owner> owner_;
  std::shared_ptr<Owner> told_owner_;  ///< Kept from `lane_breaking` until `lane_broken`.
  bool readable_ = false;
  bool writable_ = true;
  std::uint32_t armed_ = 0;  ///< The events that were asked for and have not come.
  bool watched_ = false;     ///< By the poller.
  std::thread::id leader_;   ///< Of nobody: the lane is not led.
  bool may_leave_ = false;   ///< The leader has gone, and `leave_unattended` has not been asked.
  bool unattended_ = false;  ///< Nobody waits for bytes; the timer is armed.
  bool attend_timer_armed_ = false;
  std::uint64_t calls_in_a_row_ = 0;
  std::uint64_t row_ = shortest_row;  ///< So many have to be, for another one to be expected.
  kit::Clock::time_point last_led_;   ///< When the last bytes for a leader came.
  asio::steady_timer attend_timer_;
  bool leaving_ = false;  ///< With bells: whoever takes leave looks, and may sleep, until the lane is shut.
  bool tired_ = false;  ///< Nothing has come since the poller gave it up.
  std::uint64_t moved_ = 0;
  std::size_t careful_out_ = 0;  ///< Of the next bytes to send or to receive, these many go a page of memory at a time,
  std::size_t careful_in_ = 0;   ///< until the page is found that isn't there.
  bool drain_timer_armed_ = false;
  asio::steady_timer frame_timer_;
  std::optional<FrameReader::Progress> frame_watched_;  ///< What had come when the timer was armed.
  std::optional<std::uint64_t> frame_prolonged_;        ///< How many frames had come when the peer got its time once more.
  bool running_ = false;
  bool failed_ = false;
  std::error_code failure_;
  std::string failure_why_;

  /// Set when the peer has closed another connection of the link.
  struct Outlived {
    kit::Clock::time_point since;
    std::error_code cause;
    std::string why;
    std::shared_ptr<Owner> owner;
  };
  std::optional<Outlived> outlived_;

  std::atomic<bool> wants_to_send_{false};
};

/// The connection of a socket, encrypted by `tls` if that isn't null.
[[nodiscard]] Lane::Connection connection_of(asio::ip::tcp::socket socket, std::unique_ptr<TlsStream> tls = nullptr);

}  // namespace kvferry::tcp
