// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_COMPLETION_HPP
#define KVFERRY_COMPLETION_HPP

#include <asio/any_io_executor.hpp>
#include <asio/associated_allocator.hpp>
#include <asio/associated_cancellation_slot.hpp>
#include <asio/associated_executor.hpp>
#include <asio/cancellation_type.hpp>
#include <asio/executor_work_guard.hpp>

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <kvferry/detail/posted_handler.hpp>
#include <kvferry/detail/recycled.hpp>
#include <kvferry/peer_event.hpp>
#include <kvferry/side_message.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI {

namespace detail {
/// Logs the exception that is being handled, as `exception_dropped`: nobody could catch it.
/// @param where the place at which it was thrown: "at a deadline".
void log_exception(std::string_view where) noexcept;

/// A handler that runs inside the call that completes it, like those of `CompletionHandler::direct`: it has a member type
/// `completes_directly`, and may have `on_cancel` and `cancellable` as `CompletionHandler` has.
template <class Handler>
concept CompletesDirectly = requires {
  typename Handler::completes_directly;
};
}  // namespace detail

template <class Signature>
class CompletionHandler;

/// Holds a completion handler of any type, so that virtual functions can take it. Move-only; called once.
///
/// It holds the handler, a work guard on the executor that the handler is associated with (the channel's where it has
/// none) and the handler's cancellation slot. Calling it never runs the handler inside the call: the handler is posted
/// to its executor. (Asio 1.22 has no `any_completion_handler`.)
///
/// An executor that is asked for `blocking.never`, and runs the handler inside the call all the same, breaks that. The library
/// may then hold locks while the handler runs, and a `close` in it hangs.
///
/// **A handler that throws.** If the handler runs on the user's executor, the exception comes out of that executor's
/// `run`, as usual with Asio. On the channel's own threads the exception is dropped and logged (`exception_dropped`),
/// and the thread goes on.
///
/// **Memory.** A handler with an allocator of its own (`asio::associated_allocator`) is kept in that allocator's memory until
/// it runs. When it is called, all of the memory has been given back, on the same thread, as Asio's own operations do it. So a
/// handler may own the memory, or start an operation that uses it anew.
///
/// **No memory.** The memory for posting is allocated when the handler is handed over. So
/// posting to an `asio::io_context` (the channel's own threads run one), an `asio::thread_pool`, or a strand of one
/// allocates nothing. Another executor (`asio::use_future` has one) allocates by itself. If it throws `std::bad_alloc`,
/// posting is tried again, up to a hundred times. The handler runs once, even if an executor has taken it and thrown.
/// If there still is no memory, or the executor throws something else, the handler is dropped and logged
/// (`exception_dropped`): the operation has ended, but its handler never runs.
///
/// Thread safety: distinct objects are independent. The call may come from any thread. The cancellation slot is touched
/// in two places only, as Asio's rules for slots demand: in the initiating call (`on_cancel`), and on the handler's
/// executor just before the handler runs.
template <class... Args>
class CompletionHandler<void(Args...)> {
 public:
  using CancelFunction = std::function<void(asio::cancellation_type)>;

  CompletionHandler() = default;

  /// @param handler any Asio completion handler for `void(Args...)`.
  /// @param fallback where the handler runs if it is not associated with an executor of its own.
  template <class Handler>
  CompletionHandler(Handler&& handler, const asio::any_io_executor& fallback)
      : model_(make_model(std::forward<Handler>(handler), fallback)) {}

  /// Makes a handler that runs inside the call that completes it, on the thread of that call. It is for the library's
  /// own use, and for transports that wrap another one. The handler may wake a thread or post; it must not block or
  /// call into a channel. An exception of the handler is dropped and logged.
  template <class Function>
  [[nodiscard]] static CompletionHandler direct(Function&& function) {
    CompletionHandler handler;
    handler.model_ = std::make_shared<Direct<std::decay_t<Function>>>(std::forward<Function>(function));
    return handler;
  }

  /// As `direct`, of a function object that is made of `given` and that the caller shares.
  template <class Function, class... Given>
  [[nodiscard]] static std::pair<CompletionHandler, std::shared_ptr<Function>> shared(Given&&... given) {
    const auto model = detail::make_recycled<Direct<Function>>(std::in_place, std::forward<Given>(given)...);
    CompletionHandler handler;
    handler.model_ = model;
    return {std::move(handler), std::shared_ptr<Function>(model, &model->function_)};
  }

  /// Makes a handler that calls `function(other, args...)` inside the call that completes it; `function` ends `other`
  /// with its own results. Cancelling `other` cancels it.
  template <class Other, class Function>
  [[nodiscard]] static CompletionHandler wrapping(Other other, Function function) {
    return direct(Wrapping<Other, Function>{std::move(other), std::move(function)});
  }

  CompletionHandler(CompletionHandler&&) noexcept = default;
  CompletionHandler& operator=(CompletionHandler&&) noexcept = default;

  /// Whether there is a handler that has not been called yet.
  explicit operator bool() const noexcept { return model_ != nullptr; }

  /// Posts the handler with these arguments to its executor. Afterwards this object is empty.
  void operator()(Args... args) noexcept {
    auto model = std::move(model_);
    auto& self = *model;
    try {
      self.post(std::move(model), std::move(args)...);
    } catch (...) {
      detail::log_exception("when a handler was posted, or by one that is called directly");
    }
  }

  /// Has `cancel` called when the caller emits on the handler's cancellation slot; does nothing if there is no slot.
  /// To be called within the initiating function only. `cancel` must be cheap, must not run the handler, and may be called
  /// from any thread.
  void on_cancel(CancelFunction cancel) { model_->on_cancel(std::move(cancel)); }

  /// Whether the caller can cancel at all. If not, a transport needs no function for `on_cancel`.
  [[nodiscard]] bool cancellable() const noexcept { return model_->cancellable(); }

 private:
  struct Concept {
    virtual ~Concept() = default;
    /// @param self this.
    virtual void post(std::shared_ptr<Concept> self, Args... args) = 0;
    virtual void on_cancel(CancelFunction cancel) = 0;
    [[nodiscard]] virtual bool cancellable() const noexcept = 0;
  };

  template <class Handler>
  struct Model final : Concept, detail::PostedHandler {
    using Executor = asio::associated_executor_t<Handler, asio::any_io_executor>;

    template <class Given>
    Model(Given&& handler, const asio::any_io_executor& fallback)
        : handler_(asio::get_associated_allocator(handler), std::forward<Given>(handler)),
          work_(asio::get_associated_executor(*handler_, fallback)) {}

    void post(std::shared_ptr<Concept> self, Args... args) override {
      const auto work = std::move(work_);
      args_.emplace(std::move(args)...);
      detail::post_handler(work.get_executor(), std::static_pointer_cast<Model>(std::move(self)));
    }

    void run(std::shared_ptr<PostedHandler> self) override {
      // Nothing of the handler stays behind for the thread that has posted it, which may let go of this last.
      Handler handler(handler_.take());
      std::tuple<Args...> args(std::move(*args_));
      args_.reset();
      self.reset();
      if (auto slot = asio::get_associated_cancellation_slot(handler); slot.is_connected()) {
        slot.clear();
      }
      std::apply(std::move(handler), std::move(args));
    }

    void on_cancel(CancelFunction cancel) override {
      if (auto slot = asio::get_associated_cancellation_slot(*handler_); slot.is_connected()) {
        slot.assign(std::move(cancel));
      }
    }

    [[nodiscard]] bool cancellable() const noexcept override {
      return asio::get_associated_cancellation_slot(*handler_).is_connected();
    }

    detail::KeptHandler<Handler, asio::associated_allocator_t<Handler>> handler_;  ///< Until it runs.
    std::optional<std::tuple<Args...>> args_;  ///< From when it is posted until it runs.
    asio::executor_work_guard<Executor> work_;
  };

  template <class Function>
  struct Direct final : Concept {
    explicit Direct(Function function) : function_(std::move(function)) {}
    template <class... Given>
    explicit Direct(std::in_place_t /*here*/, Given&&... given) : function_(std::forward<Given>(given)...) {}
    void post(std::shared_ptr<Concept> /*self*/, Args... args) override { std::move(function_)(std::move(args)...); }
    void on_cancel(CancelFunction cancel) override {
      if constexpr (requires { function_.on_cancel(std::move(cancel)); }) {
        function_.on_cancel(std::move(cancel));
      }
    }
    [[nodiscard]] bool cancellable() const noexcept override {
      if constexpr (requires { function_.cancellable(); }) {
        return function_.cancellable();
      } else {
        return false;
      }
    }

    Function function_;
  };

  template <class Other, class Function>
  struct Wrapping {
    void operator()(Args... args) { function(other, std::move(args)...); }
    void on_cancel(CancelFunction cancel) { other.on_cancel(std::move(cancel)); }
    [[nodiscard]] bool cancellable() const noexcept { return other.cancellable(); }

    Other other;
    Function function;
  };

  template <class Handler>
  [[nodiscard]] static std::shared_ptr<Concept> make_model(Handler&& handler, const asio::any_io_executor& fallback) {
    if constexpr (detail::CompletesDirectly<std::decay_t<Handler>>) {
      return std::make_shared<Direct<std::decay_t<Handler>>>(std::forward<Handler>(handler));
    } else {
      return std::make_shared<Model<std::decay_t<Handler>>>(std::forward<Handler>(handler), fallback);
    }
  }

  std::shared_ptr<Concept> model_;
};

/// Ends a transfer with its error, if any, and the number of objects that were transferred.
using Completion = CompletionHandler<void(std::error_code, std::size_t)>;
/// Ends a handshake, or the exchange of a side message, with its error, if any, and the answer, if any.
using SideMessageCompletion = CompletionHandler<void(std::error_code, std::optional<SideMessage>)>;
/// Ends the wait for a notification.
using NotificationCompletion = CompletionHandler<void(std::error_code, Notification)>;
/// Ends the wait for several notifications of a key.
using NotificationsCompletion = CompletionHandler<void(std::error_code, std::vector<Notification>)>;
/// Ends the wait for news of a peer.
using PeerEventCompletion = CompletionHandler<void(std::error_code, PeerEvent)>;
/// Ends a fence.
using FenceCompletion = CompletionHandler<void(std::error_code)>;
/// Ends a `remove_region`.
using RemoveRegionCompletion = CompletionHandler<void(std::error_code)>;
/// Ends a disconnect.
using DisconnectCompletion = CompletionHandler<void(std::error_code)>;
/// Ends a `notify`.
using NotifyCompletion = CompletionHandler<void(std::error_code)>;

}  // namespace kvferry

#endif  // KVFERRY_COMPLETION_HPP
