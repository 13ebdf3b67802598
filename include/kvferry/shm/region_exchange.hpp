// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/shared_areas.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/tcp/peer_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// This side's regions, as a peer maps them. One thread at a time, but for `path`.
class HandedRegions {
 public:
  using Share = tcp::PeerMemory::Share;

  [[nodiscard]] std::optional<Share> share(const LocalRegion& region, UnixSocket& socket);
  [[nodiscard]] bool answered(std::uint32_t number, std::uint32_t status);
  void unshare(std::uint32_t number);

  /// Whether the peer has mapped any.
  [[nodiscard]] bool any() const noexcept { return mapped_ != 0; }
  /// Whether it has mapped all of these.
  [[nodiscard]] bool cover(std::span<const tcp::Reference> references);
  [[nodiscard]] std::string path() const;

 private:
  struct Handed {
    std::uint32_t number = 0;
    std::uint64_t address = 0;
    std::uint64_t size = 0;
    bool answered = false;
    bool mapped = false;
    bool gone = false;  ///< Before it was answered.
  };
  void not_handed(const LocalRegion& region, const std::string& why);

  SharedAreasView areas_;
  std::vector<Handed> handed_;
  std::size_t mapped_ = 0;

  mutable std::mutex mutex_;  ///< Guards what follows.
  std::size_t told_mapped_ = 0;
  std::size_t refused_ = 0;
  std::string why_not_;  ///< The first one's.
};

/// A peer's regions that are mapped here. One thread at a time, but for `path` and `maps`.
class MappedRegions {
 public:
  using Share = tcp::PeerMemory::Share;

  /// @return 0, or an errno; EBADF: the descriptor hasn't come.
  [[nodiscard]] std::uint32_t map(const RemoteRegion& region, const Share& share, UnixSocket& socket);
  void unmap(std::uint32_t number);

  [[nodiscard]] bool any() const noexcept { return !regions_.empty(); }
  /// As they lie here, all readable.
  [[nodiscard]] const kit::RegionList& list() const noexcept { return *list_; }
  /// From any thread. False for numbers from 64 on.
  [[nodiscard]] bool maps(std::uint32_t number) const noexcept {
    return number < 64 && ((low_numbers_.load(std::memory_order_relaxed) >> number) & 1) != 0;
  }
  /// Where these lie here. @return false if not all of them do.
  [[nodiscard]] bool find(std::span<const tcp::Reference> references, std::vector<iovec>& pieces) const;
  /// Has the kernel copy what lies in mapped memory to memory that may be gone. @return `all` or `unwritable`.
  [[nodiscard]] tcp::PeerMemory::Fetched read(std::span<const iovec> from, std::span<const iovec> to) const;
  [[nodiscard]] std::string path() const;

 private:
  struct Region {
    LocalRegion region;         ///< With the address that it has here.
    std::uint64_t address = 0;  ///< The peer's.
    MappedFile file;
  };
  void make_list();

  std::vector<Region> regions_;  ///< Ordered by number.
  std::uint32_t next_ = 0;
  std::atomic<std::uint64_t> low_numbers_{0};  ///< A bit for each of the regions with a number below 64.
  std::unique_ptr<const kit::RegionList> list_ =
      std::make_unique<const kit::RegionList>(std::vector<LocalRegion>(), 0, 0);

  mutable std::mutex mutex_;  ///< Guards what follows.
  std::size_t told_ = 0;
  std::string why_not_;  ///< The last failure.
};

}  // namespace kvferry::shm
