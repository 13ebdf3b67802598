// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/shared_areas.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/tcp/peer_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// This side's regions that a peer reads by itself. One thread at a time, except for `path`.
class HandedRegions {
 public:
  using Share = tcp::PeerMemory::Share;

  /// @param in_place the peer can read this process's memory.
  [[nodiscard]] std::optional<Share> share(const LocalRegion& region, bool in_place, UnixSocket& socket);
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
    bool in_place = false;
    bool answered = false;
    bool mapped = false;
    bool gone = false;  ///< Before it was answered.
  };
  void not_handed(const LocalRegion& region, const std::string& why);
  [[nodiscard]] std::shared_ptr<const Descriptor> file_of(const LocalRegion& region, std::uint64_t& inode);

  SharedAreasView areas_;
  std::vector<Handed> handed_;
  std::size_t mapped_ = 0;

  mutable std::mutex mutex_;  ///< Guards what follows.
  std::size_t told_mapped_ = 0;
  std::size_t refused_ = 0;
  std::string why_not_;  ///< The first one's.
};

/// A peer's regions that this side reads by itself. One thread at a time, except for `path` and `reads`.
class MappedRegions {
 public:
  using Share = tcp::PeerMemory::Share;
  using Way = tcp::PeerMemory::Way;

  /// @param in_place this process can read the peer's memory.
  /// @return 0, or an errno; EBADF: the descriptor hasn't come.
  [[nodiscard]] std::uint32_t map(const RemoteRegion& region, const Share& share, bool in_place, UnixSocket& socket);
  void unmap(std::uint32_t number);

  /// Whether any is mapped.
  [[nodiscard]] bool any() const noexcept { return !lists_[static_cast<std::size_t>(Way::mapped)]->all().empty(); }
  [[nodiscard]] const kit::RegionList& list(Way way) const noexcept { return *lists_[static_cast<std::size_t>(way)]; }
  /// From any thread. False for numbers from 64 on.
  [[nodiscard]] bool reads(std::uint32_t number) const noexcept {
    return number < 64 && ((low_numbers_.load(std::memory_order_relaxed) >> number) & 1) != 0;
  }
  /// Translates these pieces to this process's addresses. @return false if not all of them are mapped here.
  [[nodiscard]] bool find(std::span<const tcp::Reference> references, std::vector<iovec>& pieces) const;
  /// Has the kernel copy from mapped memory to memory that may be missing.
  /// @param ec why, if it `failed`: the kernel doesn't copy any more. A new connection finds another way.
  /// @return `all`, `unwritable` or `failed`.
  [[nodiscard]] tcp::PeerMemory::Fetched read(std::span<const iovec> from, std::span<const iovec> to,
                                              std::error_code& ec) const;
  [[nodiscard]] std::string path() const;

 private:
  struct Region {
    LocalRegion region;         ///< With the address that it has here, if it is mapped.
    std::uint64_t address = 0;  ///< The peer's.
    MappedFile file;
    Way way = Way::mapped;
  };
  [[nodiscard]] static std::unique_ptr<const kit::RegionList> none() {
    return std::make_unique<const kit::RegionList>(std::vector<LocalRegion>(), 0, 0);
  }
  void make_lists();
  /// The region in which this lies here, if its descriptor was kept; else null.
  [[nodiscard]] const Region* with_file(const iovec& piece) const;

  std::vector<Region> regions_;  ///< Ordered by number.
  std::uint32_t next_ = 0;
  bool by_file_ = false;                       ///< There may be regions that the kernel copies from their files alone.
  std::atomic<std::uint64_t> low_numbers_{0};  ///< A bit for each of the regions with a number below 64.
  std::array<std::unique_ptr<const kit::RegionList>, 2> lists_{none(), none()};  ///< By `Way`.

  mutable std::mutex mutex_;  ///< Guards what follows.
  std::size_t told_ = 0;
  std::string why_not_;  ///< The last failure.
};

}  // namespace kvferry::shm
