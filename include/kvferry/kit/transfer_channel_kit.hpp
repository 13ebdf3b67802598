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

/// Everything of a channel that does not depend on how bytes travel, written once: checks of arguments, deadlines,
/// cancellation, exactly-once completion, statuses, the peer table, handshakes (also two at once, and restarts),
/// side messages, notifications, I/O threads and closing.
///
/// A transport derives from it, implements `transport`, `capabilities`, `dial` and `accept` and a `Link`, calls
/// `start()` at the end of its constructor and `close()` and `run_handlers_left()` in its destructor.
///
/// It adds to `BaseTransferChannel`'s promises: a transfer to a peer whose connection broke reconnects by itself,
/// within the operation's deadline, where the peer's init url is known. If it then finds another incarnation of the
/// peer, every one-sided transfer that was started before that is known ends with `errc::peer_restarted`, because its
/// page indexes were agreed with the old one. Those started after one of them was told so, or after a
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
  /// All but the paths, which the transport adds.
  [[nodiscard]] ChannelStats stats() const override;
  /// Answers `P2PInitSideMsg` with the lookup url, or an empty one, and `PySocketInitRequest` with "ok", as LMCache
  /// does; throws `errc::unhandled_side_message` for others.
  SideMessage handle_init_side_msg(const SideMessage& message) override;
  void close() override;

 protected:
  /// Checks the options and starts the I/O threads.
  /// @throws TransferError `errc::invalid_region`, `errc::invalid_url`.
  explicit TransferChannelKit(ChannelOptions options);

  /// Starts listening for handshakes. From here on `accept` may be called.
  /// @throws TransferError `errc::not_supported`: the options have checksums, and the transport has none; the errno of a
  ///   bind that failed; `errc::timed_out`: a name to listen at was not resolved within
  ///   `ChannelOptions::handshake_timeout`.
  void start();

  /// @name What a transport implements
  /// @{

  /// Begins an attempt to connect to a peer. Called on any thread: a caller's, the handshake thread, one that runs the
  /// executor; must not block. May throw `TransferError` if there can't be an attempt.
  [[nodiscard]] virtual std::unique_ptr<Dial> dial(const std::string& peer_id) = 0;

  /// Runs what answers a peer's attempt, `accept` included: here, that is on the handshake thread, on which it must not
  /// block then. A transport whose `accept` may take its time runs it on a thread of its own, and has run all of it when
  /// `stop_listening` returns; later ones it runs inside the call.
  /// @param source where the attempt came from: see `HandshakeService::Reply::source`.
  /// @param bytes that `answer` takes up while it waits.
  /// @return false if too much waits already, from there or in all: then the peer is told so. `answer` isn't called.
  // NOLINTNEXTLINE(performance-unnecessary-value-param)
  [[nodiscard]] virtual bool run_accept(const std::string& source, std::size_t bytes, std::function<void()> answer) {
    (void)source;
    (void)bytes;
    answer();
    return true;
  }

  /// Answers a peer's attempt: returns this side's endpoint and later hands over the link, or why there is none.
  /// Called where `run_accept` runs it. May throw `TransferError` to refuse.
  [[nodiscard]] virtual Bytes accept(std::shared_ptr<LinkHost> host, const Bytes& remote_endpoint,
                                     Clock::time_point deadline, LinkHandler on_link) = 0;

  /// Whether what it moves leaves this host, and nothing encrypts it on the way. Constant once the channel is made. Among
  /// several transports, one that does isn't used with a keyring: see `AutoOptions::allow_unencrypted`. With
  /// `ChannelOptions::require_encryption` `start()` refuses it.
  [[nodiscard]] virtual bool leaves_host_in_the_clear() const noexcept { return true; }

  /// Called once by `close()` after all links are shut: stop listening for data.
  virtual void stop_listening() {}

  /// Makes a region that is being added ready for peers: registers it, or refuses it. Called on the thread that adds it, one
  /// at a time; links don't know the region before it has returned. Not called for the regions that the channel was made
  /// with. @throws TransferError then there is no such region.
  virtual void register_region(const LocalRegion& region) { (void)region; }
  /// Called once, by `start`. @return what is called with a region's number when it has been removed and nothing uses it
  ///   any more, before the removal ends: on any thread, without locks, perhaps after the channel is closed or gone. Null:
  ///   there is nothing to be done.
  [[nodiscard]] virtual std::function<void(std::uint32_t)> region_forgetter() { return nullptr; }
  /// @}

  /// Runs the handlers that are left on the channel's own threads, which may call the channel still, and ends these
  /// threads; does nothing with an executor of the user's. For destructors, after `close()`; not on one of the threads.
  void run_handlers_left();

  /// Whether this process is a forked child of the one in which the channel was made. Then nothing of the channel may be
  /// touched that has a lock, a thread or a descriptor. A transport's destructor does nothing, but hands what it has to
  /// `keep_inherited`, and its own functions fail with `errc::forked`; those of the kit do so by themselves.
  [[nodiscard]] bool inherited() const noexcept;
  /// Keeps what a destructor would destroy for as long as the process lives.
  static void keep_inherited(std::shared_ptr<void> parts);

  /// Lets side messages reach `handle_init_side_msg`, those that came before first. For subclasses whose options have
  /// `hold_side_messages`: to be called at the end of the constructor.
  void answer_side_messages();

  [[nodiscard]] const ChannelOptions& options() const noexcept;

  /// The channel's log, for the transport's own records. Never null; may be kept for longer than the channel.
  [[nodiscard]] std::shared_ptr<Logger> logger() const;
  /// Counts and logs the strangers that the transport turns away. Never null; may be kept for longer than the channel.
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

 private:
  /// @param incarnation that the peer has to be; 0: any.
  /// @param found gets the peer, if it is to be a certain incarnation; else null.
  void connect_to(InitRequest request, std::uint64_t incarnation, std::shared_ptr<PeerInfo> found,
                  SideMessageCompletion completion);

  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_TRANSFER_CHANNEL_KIT_HPP
