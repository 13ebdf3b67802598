// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_TRANSFER_CHANNEL_KIT_HPP
#define KVFERRY_KIT_TRANSFER_CHANNEL_KIT_HPP

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/channel_options.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/refusals.hpp>
#include <kvferry/kit/poller.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

class Road;
class Serving;

/// Implements all parts of a channel that do not depend on the transport of the bytes: checks of arguments, deadlines,
/// cancellation, completion exactly once, statuses, the peer table, handshakes (also two at once, and restarts), side
/// messages, notifications, I/O threads and closing.
///
/// A transport derives from it, implements `transport`, `capabilities`, `dial` and `accept` and a `Link`, calls
/// `start()` at the end of its constructor and `close()` and `run_handlers_left()` in its destructor.
///
/// It adds to `BaseTransferChannel`'s promises: a transfer to a peer whose connection broke reconnects by itself,
/// within the operation's deadline, if the peer's init url is known. If it then finds another incarnation of the peer,
/// every one-sided transfer that was started before this is known ends with `errc::peer_restarted`, because its page
/// indexes were agreed with the old one. Transfers that are started after one of them has ended so, or after a
/// `lazy_init_peer_connection`, go to the new one.
class KVFERRY_EXPORT TransferChannelKit : public BaseTransferChannel {
  friend class Road;

 public:
  ~TransferChannelKit() override;

  [[nodiscard]] asio::any_io_executor get_executor() const override;
  [[nodiscard]] std::vector<LocalRegion> regions() const override;
  [[nodiscard]] std::string peer_init_url() const override;
  [[nodiscard]] std::uint64_t incarnation() const noexcept override;
  [[nodiscard]] std::optional<PeerInfo> peer_info(std::string_view peer_id) const override;
  [[nodiscard]] std::vector<PeerInfo> peers() const override;
  [[nodiscard]] std::vector<std::byte> local_metadata(std::string_view local_id) const override;
  [[nodiscard]] bool remote_xfer_handler_exists(std::string_view peer_id) const override;
  /// Everything except the paths, which the transport adds.
  [[nodiscard]] ChannelStats stats() const override;
  /// Answers `P2PInitSideMsg` with the lookup url, or an empty one, and `PySocketInitRequest` with "ok", as LMCache
  /// does; throws `errc::unhandled_side_message` for others.
  SideMessage handle_init_side_msg(const SideMessage& message) override;
  void close() override;

 protected:
  /// Checks the options and starts the I/O threads.
  /// @throws TransferError `errc::invalid_region`, `errc::invalid_url`.
  explicit TransferChannelKit(ChannelOptions options);

  /// Starts listening for handshakes. From now on `accept` may be called.
  /// @throws TransferError `errc::not_supported` if the options have checksums and the transport has none; the errno of
  ///   a bind that failed; `errc::timed_out` if a name to listen at was not resolved within
  ///   `ChannelOptions::handshake_timeout`.
  void start();

  /// @name Functions that a transport implements
  /// @{

  /// Begins an attempt to connect to a peer. Called on any thread: a caller's, the handshake thread, or one that runs
  /// the executor. It must not block. It may throw `TransferError` if no attempt is possible.
  [[nodiscard]] virtual std::unique_ptr<Dial> dial(const std::string& peer_id) = 0;

  /// Runs `answer`, which answers a peer's attempt and calls `accept`. The default runs it on the handshake thread, on
  /// which `accept` must not block. A transport whose `accept` may take long runs it on a thread of its own. It has run
  /// all of them when `stop_listening` returns, and runs later ones inside the call.
  /// @param source the origin of the attempt: see `HandshakeService::Reply::source`.
  /// @param bytes the memory that `answer` takes up while it waits.
  /// @return false if too many answers wait already, for this source or in all: the peer is told so. `answer` isn't
  ///   called.
  // NOLINTNEXTLINE(performance-unnecessary-value-param): transports keep it
  [[nodiscard]] virtual bool run_accept(const std::string& source, std::size_t bytes, std::function<void()> answer) {
    (void)source;
    (void)bytes;
    answer();
    return true;
  }

  /// Answers a peer's attempt: returns this side's endpoint and later hands over the link, or the reason why there is
  /// none. `run_accept` decides on which thread it runs. It may throw `TransferError` to refuse.
  [[nodiscard]] virtual Bytes accept(std::shared_ptr<LinkHost> host, const Bytes& remote_endpoint,
                                     Clock::time_point deadline, LinkHandler on_link) = 0;

  /// Whether pages leave this host unencrypted. Constant once the channel is made. If so, an `AutoTransferChannel`
  /// doesn't use this transport with a keyring: see `AutoOptions::allow_unencrypted`. With
  /// `ChannelOptions::require_encryption`, `start()` throws.
  [[nodiscard]] virtual bool leaves_host_in_the_clear() const noexcept { return true; }

  /// Stops listening for data. `close()` calls it once, after all links are shut.
  virtual void stop_listening() {}

  /// Prepares a region that is being added: registers it, or refuses it. Called on the thread that adds it, for one
  /// region at a time. Links don't know the region before this has returned. Not called for the regions with which the
  /// channel was made. By default it refuses memory of a dma-buf, which the CPU doesn't reach.
  /// @throws TransferError to refuse the region.
  virtual void register_region(const LocalRegion& region);
  /// Called once, by `start`.
  /// @return the function that undoes `register_region`. It is called with the number of a removed region when nothing
  ///   uses it any more, before the removal ends: on any thread, without locks, perhaps after the channel is closed or
  ///   destroyed. Null: nothing has to be undone.
  [[nodiscard]] virtual std::function<void(std::uint32_t)> region_forgetter() { return nullptr; }
  /// @}

  /// Runs the remaining handlers on the channel's own threads (they may still call the channel) and ends these threads.
  /// Does nothing with an executor of the user. For destructors, after `close()`; not on one of the threads.
  void run_handlers_left();

  /// Whether this process is a forked child of the one in which the channel was made. Then don't touch any part of the
  /// channel that has a lock, a thread or a descriptor. A transport's destructor only hands its parts to
  /// `keep_inherited`, and its own functions fail with `errc::forked`; the kit's functions do so by themselves.
  [[nodiscard]] bool inherited() const noexcept;
  /// Keeps parts that a destructor would destroy for as long as the process lives.
  static void keep_inherited(std::shared_ptr<void> parts);

  /// Lets side messages reach `handle_init_side_msg`, first the ones that came before. Subclasses whose options have
  /// `hold_side_messages` call it at the end of the constructor.
  void answer_side_messages();

  [[nodiscard]] const ChannelOptions& options() const noexcept;

  /// The channel's log, for the transport's own records. Never null; may be kept for longer than the channel.
  [[nodiscard]] std::shared_ptr<Logger> logger() const;
  /// Counts and logs the strangers that the transport refuses. Never null; may be kept for longer than the channel.
  [[nodiscard]] std::shared_ptr<Refusals> refusals() const;

  /// Null if the channel runs on the user's executor.
  [[nodiscard]] std::shared_ptr<Poller> poller() const;

  void start_transfer(TransferRequest request, Completion completion) override;
  /// Has the peer's link use the caller's thread: see `Link::serve`.
  std::size_t run_transfer(TransferRequest request, std::error_code& ec) override;
  void start_init_peer(InitRequest request, SideMessageCompletion completion) override;
  void start_side_message(InitRequest request, SideMessageCompletion completion) override;
  void start_receive_notification(std::optional<std::chrono::milliseconds> timeout,
                                  NotificationCompletion completion) override;
  void start_receive_notifications(NotificationsRequest request, NotificationsCompletion completion) override;
  void start_connect(ConnectRequest request, ConnectCompletion completion) override;
  void start_disconnect(std::string peer_id, DisconnectCompletion completion) override;
  void start_wait_peer_event(std::optional<std::chrono::milliseconds> timeout,
                             PeerEventCompletion completion) override;
  void start_fence(std::string peer_id, std::optional<std::chrono::milliseconds> timeout,
                   FenceCompletion completion) override;
  std::uint32_t run_add_region(const MemoryRegion& region) override;
  void start_remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout,
                           RemoveRegionCompletion completion) override;
  [[nodiscard]] bool running_in_io_thread() const noexcept override;
  [[nodiscard]] bool answers_in_this_thread(std::string_view url) const override;

 private:
  /// @param incarnation the one that the peer must have; 0: any.
  /// @param found gets the peer if `incarnation` isn't 0; else null.
  void connect_to(InitRequest request, std::uint64_t incarnation, std::shared_ptr<PeerInfo> found,
                  SideMessageCompletion completion);
  /// What `close` does where it isn't refused.
  void shut();

  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_TRANSFER_CHANNEL_KIT_HPP
