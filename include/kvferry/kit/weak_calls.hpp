// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_WEAK_CALLS_HPP
#define KVFERRY_KIT_WEAK_CALLS_HPP

#include <asio/any_io_executor.hpp>
#include <asio/post.hpp>

#include <memory>
#include <system_error>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Makes a function that has `executor` call `function(object)`, if the object still lives then. It may be called anywhere,
/// also with locks held or within a call of the object, and several times. It doesn't keep the object alive.
template <class Object, class Function>
[[nodiscard]] auto posted(asio::any_io_executor executor, std::weak_ptr<Object> object, Function function) {
  return [executor = std::move(executor), object = std::move(object), function = std::move(function)] {
    asio::post(executor, [object, function] {
      if (const auto self = object.lock()) {
        function(*self);
      }
    });
  };
}

/// Makes a handler for a timer. It calls `function(object)` if the timer wasn't cancelled and the object still lives. It
/// doesn't keep the object alive.
template <class Object, class Function>
[[nodiscard]] auto when_expired(std::weak_ptr<Object> object, Function function) {
  return [object = std::move(object), function = std::move(function)](std::error_code cancelled) {
    if (const auto self = object.lock(); self && !cancelled) {
      function(*self);
    }
  };
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_WEAK_CALLS_HPP
