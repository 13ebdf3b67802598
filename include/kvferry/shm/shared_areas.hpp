// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The memory of a `SharedRegion`.
struct SharedArea {
  const std::byte* data = nullptr;
  std::size_t size = 0;
  std::weak_ptr<const Descriptor> file;  ///< Opened for reading only. An open descriptor keeps the memory.
  std::uint64_t inode = 0;               ///< Of the file.
};

/// The shared areas of this process. Thread-safe.
class SharedAreas {
 public:
  using List = std::vector<SharedArea>;  ///< Ordered by `data`.

  [[nodiscard]] static SharedAreas& of_process();

  /// Called before a region's memory is mapped, and so before a child can inherit it.
  void expect() noexcept { ever_.store(true); }
  /// Whether there has been any in this process.
  [[nodiscard]] bool ever() const noexcept { return ever_.load(); }

  void enter(SharedArea area);
  void leave(const std::byte* data) noexcept;
  [[nodiscard]] std::shared_ptr<const List> now() const;
  /// Changes whenever the list does.
  [[nodiscard]] std::uint64_t generation() const noexcept { return generation_.load(std::memory_order_acquire); }

 private:
  mutable std::mutex mutex_;
  const std::shared_ptr<const List> none_ = std::make_shared<const List>();
  std::shared_ptr<const List> list_ = none_;
  std::atomic<std::uint64_t> generation_{1};
  std::atomic<bool> ever_{false};
};

/// One thread's questions about these areas.
class SharedAreasView {
 public:
  /// Whether all of these pieces lie in shared memory of this process. Such memory exists and may be read and written.
  [[nodiscard]] bool cover(std::span<const iovec> pieces);
  /// @return null if that isn't the whole of one.
  [[nodiscard]] const SharedArea* whole(const std::byte* data, std::size_t size);

 private:
  [[nodiscard]] const SharedAreas::List& list();
  [[nodiscard]] const SharedArea* find(const std::byte* address);

  std::shared_ptr<const SharedAreas::List> list_;
  std::uint64_t generation_ = 0;
};

}  // namespace kvferry::shm
