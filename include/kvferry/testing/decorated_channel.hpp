// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/post.hpp>
#include <asio/strand.hpp>

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/kit/gate.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// A channel around another one that behaves like it. A decorator overrides a part of it.
///
/// The other channel answers side messages, by its own `handle_init_side_msg`.
class DecoratedChannel : public BaseTransferChannel {
 public:
  explicit DecoratedChannel(std::unique_ptr<BaseTransferChannel> inner) : inner_(std::move(inner)) {}
  DecoratedChannel(const DecoratedChannel&) = delete;
  DecoratedChannel& operator=(const DecoratedChannel&) = delete;
  ~DecoratedChannel() override {
    gate_->close();  // before the inner channel goes, and with it the threads for which cancellations are posted
  }

  [[nodiscard]] std::string_view transport() const noexcept override { return inner_->transport(); }
  [[nodiscard]] Capabilities capabilities() const noexcept override { return inner_->capabilities(); }
  [[nodiscard]] asio::any_io_executor get_executor() const override { return inner_->get_executor(); }
  [[nodiscard]] std::vector<LocalRegion> regions() const override { return inner_->regions(); }
  [[nodiscard]] std::string peer_init_url() const override { return inner_->peer_init_url(); }
  [[nodiscard]] std::uint64_t incarnation() const noexcept override { return inner_->incarnation(); }
  [[nodiscard]] std::optional<PeerInfo> peer_info(std::string_view peer_id) const override {
    return inner_->peer_info(peer_id);
  }
  [[nodiscard]] ChannelStats stats() const override { return inner_->stats(); }
  [[nodiscard]] bool remote_xfer_handler_exists(std::string_view peer_id) const override {
    return inner_->remote_xfer_handler_exists(peer_id);
  }
  [[nodiscard]] std::vector<PeerInfo> peers() const override { return inner_->peers(); }
  [[nodiscard]] std::vector<std::byte> local_metadata(std::string_view local_id) const override {
    return inner_->local_metadata(local_id);
  }
  void close() override { inner_->close(); }

 protected:
  [[nodiscard]] BaseTransferChannel& inner() { return *inner_; }
  /// For what cancellation slots call, which may outlive the channel: see `kit::cancellation`.
  [[nodiscard]] const std::shared_ptr<kit::Gate>& gate() const noexcept { return gate_; }

  [[nodiscard]] bool running_in_io_thread() const noexcept override { return running_in_io_thread_of(*inner_); }

  void start_transfer(TransferRequest request, Completion completion) override {
    forward(std::move(completion),
            [&](auto handler) { inner_->async_transfer(std::move(request), std::move(handler)); });
  }

  void start_init_peer(InitRequest request, SideMessageCompletion completion) override {
    forward(std::move(completion), [&](auto handler) {
      inner_->async_lazy_init_peer_connection(request.local_id, request.peer_id, request.peer_init_url,
                                              std::move(request.side_message), {request.timeout, request.diagnostic},
                                              std::move(handler));
    });
  }

  void start_side_message(InitRequest request, SideMessageCompletion completion) override {
    forward(std::move(completion), [&](auto handler) {
      inner_->async_send_init_side_msg(request.peer_init_url, std::move(request.side_message).value_or(SideMessage{}),
                                       {request.timeout, request.diagnostic}, std::move(handler));
    });
  }

  void start_receive_notification(std::optional<std::chrono::milliseconds> timeout,
                                  NotificationCompletion completion) override {
    forward(std::move(completion),
            [&](auto handler) { inner_->async_receive_notification(timeout, std::move(handler)); });
  }

  void start_receive_notifications(NotificationsRequest request, NotificationsCompletion completion) override {
    forward(std::move(completion), [&](auto handler) {
      inner_->async_receive_notifications(request.key, request.count, request.timeout, std::move(handler));
    });
  }

  void start_connect(ConnectRequest request, ConnectCompletion completion) override {
    forward(std::move(completion), [&](auto handler) {
      inner_->async_connect(request.local_id, request.metadata, {request.timeout, request.diagnostic},
                            std::move(handler));
    });
  }

  void start_disconnect(std::string peer_id, DisconnectCompletion completion) override {
    forward(std::move(completion), [&](auto handler) { inner_->async_disconnect(peer_id, std::move(handler)); });
  }

  void start_wait_peer_event(std::optional<std::chrono::milliseconds> timeout,
                             PeerEventCompletion completion) override {
    forward(std::move(completion), [&](auto handler) { inner_->async_wait_peer_event(timeout, std::move(handler)); });
  }

  void start_fence(std::string peer_id, std::optional<std::chrono::milliseconds> timeout,
                   FenceCompletion completion) override {
    forward(std::move(completion), [&](auto handler) { inner_->async_fence(peer_id, timeout, std::move(handler)); });
  }

  std::uint32_t run_add_region(const MemoryRegion& region) override { return inner_->add_region(region); }

  void start_remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout,
                           RemoveRegionCompletion completion) override {
    forward(std::move(completion),
            [&](auto handler) { inner_->async_remove_region(number, timeout, std::move(handler)); });
  }

 private:
  /// Starts an operation of the inner channel that ends with this completion, and is cancelled with it. The inner
  /// handler and the inner signal meet on a strand, as Asio asks.
  template <class... Results, class Start>
  void forward(CompletionHandler<void(std::error_code, Results...)> completion, Start start) {
    const auto forwarded = std::make_shared<Forwarded>(asio::make_strand(inner_->get_executor()));
    completion.on_cancel(kit::cancellation(gate_, std::weak_ptr(forwarded), [](Forwarded& cancelled) {
      asio::post(cancelled.strand,
                 [held = cancelled.shared_from_this()] { held->signal.emit(asio::cancellation_type::terminal); });
    }));
    start(asio::bind_cancellation_slot(
        forwarded->signal.slot(),
        asio::bind_executor(forwarded->strand, [forwarded, completion = std::move(completion)](
                                                   std::error_code error, Results... results) mutable {
          completion(error, std::move(results)...);
        })));
  }

  /// An operation of the inner channel. The caller's cancellation slot may outlive that channel and its executor, and
  /// doesn't keep this.
  struct Forwarded : std::enable_shared_from_this<Forwarded> {
    explicit Forwarded(asio::any_io_executor own_strand) : strand(std::move(own_strand)) {}

    const asio::any_io_executor strand;
    asio::cancellation_signal signal;
  };

  const std::shared_ptr<kit::Gate> gate_ = std::make_shared<kit::Gate>();
  std::unique_ptr<BaseTransferChannel> inner_;
};

}  // namespace kvferry::testing
