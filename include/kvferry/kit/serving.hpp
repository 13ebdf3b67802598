// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_SERVING_HPP
#define KVFERRY_KIT_SERVING_HPP

#include <memory>

#include <kvferry/config.hpp>
#include <kvferry/kit/blocking_wait.hpp>
#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A blocking call's thread at a link's service, where the link has a use for it. Of that thread alone.
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

  /// While it lives, what this thread starts on a link is served by it.
  class KVFERRY_EXPORT Offer {
   public:
    explicit Offer(Serving& serving) noexcept;
    Offer(const Offer&) = delete;
    Offer& operator=(const Offer&) = delete;
    ~Offer();

   private:
    Serving* const before_;
  };

  /// An operation is about to be started on this link.
  void begin(const std::shared_ptr<Link>& link, const TransferRequest& request) {
    if (!link_ && !link->ends_at_once(request) && link->begin_serving()) {
      link_ = link;
    }
  }
  /// Until the operation has ended, or less.
  void serve(BlockingWait& wait) {
    if (link_ && !wait.over()) {
      link_->serve(wait);
    }
  }

 private:
  std::shared_ptr<Link> link_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_SERVING_HPP
