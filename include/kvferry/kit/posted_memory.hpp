// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_POSTED_MEMORY_HPP
#define KVFERRY_KIT_POSTED_MEMORY_HPP

#include <atomic>
#include <cstddef>
#include <memory>
#include <utility>

#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Counts the memory that this side keeps for peers' recvs that no send has met: for each peer, and for all peers of a
/// channel.
class PostedMemory {
 public:
  struct Bounds {
    std::size_t bytes = 0;
    std::size_t bytes_of_peer = 0;
  };
  /// Each peer's reserved share, even if others have taken the rest.
  static constexpr std::size_t due_bytes = std::size_t{64} << 10;

  /// A peer's. Thread-safe.
  class Share {
   public:
    explicit Share(std::shared_ptr<PostedMemory> all) : all_(std::move(all)) {}
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;
    ~Share() { all_->bytes_ -= bytes_; }

    [[nodiscard]] bool take(std::size_t bytes) noexcept {
      const Bounds& bounds = all_->bounds_;
      if (bytes > bounds.bytes_of_peer) {
        return false;
      }
      const std::size_t own = bytes_ += bytes;
      const std::size_t all = all_->bytes_ += bytes;
      if (own <= bounds.bytes_of_peer && (own <= due_bytes || all <= bounds.bytes)) {
        return true;
      }
      give_back(bytes);
      return false;
    }
    void give_back(std::size_t bytes) noexcept {
      bytes_ -= bytes;
      all_->bytes_ -= bytes;
    }

   private:
    const std::shared_ptr<PostedMemory> all_;
    std::atomic<std::size_t> bytes_{0};
  };

  explicit PostedMemory(const Bounds& bounds) : bounds_(bounds) {}
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  const Bounds bounds_;
  std::atomic<std::size_t> bytes_{0};
};

/// A part of a link's hold on its peer's share, given back when that part is gone.
class HeldMemory {
 public:
  explicit HeldMemory(std::shared_ptr<LinkHost> host) : host_(std::move(host)) {}
  HeldMemory(const HeldMemory&) = delete;
  HeldMemory& operator=(const HeldMemory&) = delete;
  ~HeldMemory() { clear(); }

  [[nodiscard]] bool take(std::size_t bytes) {
    if (!host_->take_memory(bytes)) {
      return false;
    }
    bytes_ += bytes;
    return true;
  }
  void give_back(std::size_t bytes) noexcept {
    bytes_ -= bytes;
    host_->give_back_memory(bytes);
  }
  void clear() noexcept {
    if (bytes_ != 0) {
      give_back(bytes_);
    }
  }

 private:
  const std::shared_ptr<LinkHost> host_;
  std::size_t bytes_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_POSTED_MEMORY_HPP
