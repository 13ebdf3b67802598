// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_SERVING_HPP
#define KVFERRY_KIT_SERVING_HPP

#include <memory>
#include <utility>

#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A blocking call's thread at a link's service, where the link has a use for it.
class Serving {
 public:
  Serving() = default;
  Serving(const Serving&) = delete;
  Serving& operator=(const Serving&) = delete;
  ~Serving() {
    if (link_) {
      link_->end_serving();
    }
  }

  /// At most once, on the thread itself, before the operation is started on the link.
  void begin(const std::shared_ptr<Link>& link, const TransferRequest& request) {
    if (!link->ends_at_once(request) && link->begin_serving()) {
      link_ = link;
    }
  }

  explicit operator bool() const noexcept { return link_ != nullptr; }
  Link* operator->() const noexcept { return link_.get(); }

 private:
  std::shared_ptr<Link> link_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_SERVING_HPP
