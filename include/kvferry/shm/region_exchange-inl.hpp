// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/region_exchange.hpp>

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/shm/pieces.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// How far `address` is from `begin`; more than any size if it is below.
KVFERRY_INLINE std::uint64_t offset_from(std::uint64_t begin, std::uint64_t address) { return address - begin; }

KVFERRY_INLINE bool lies_within(std::uint64_t begin, std::uint64_t size, const tcp::Reference& reference) {
  const std::uint64_t offset = offset_from(begin, reference.address);
  return offset <= size && reference.length <= size - offset;
}

}  // namespace internal

KVFERRY_INLINE void HandedRegions::not_handed(const LocalRegion& region, const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (refused_++ == 0) {
    why_not_ = "region " + std::to_string(region.number) + " " + why;
  }
}

KVFERRY_INLINE std::shared_ptr<const Descriptor> HandedRegions::file_of(const LocalRegion& region,
                                                                        std::uint64_t& inode) {
  const SharedArea* const area = areas_.whole(region.data, region.size);
  auto file = area == nullptr ? nullptr : area->file.lock();
  if (!file) {
    not_handed(region, "is no SharedRegion");
    return nullptr;
  }
  inode = area->inode;
  return file;
}

KVFERRY_INLINE std::optional<tcp::PeerMemory::Share> HandedRegions::share(const LocalRegion& region, bool in_place,
                                                                          UnixSocket& socket) {
  if (!allows(region.peer_access, Access::read)) {
    not_handed(region, "doesn't grant reading");
    return std::nullopt;
  }
  if (handed_.size() >= tcp::PeerMemory::max_mapped) {
    not_handed(region, "is one too many");
    return std::nullopt;
  }
  Share share{reinterpret_cast<std::uintptr_t>(region.data), 0};
  auto file = file_of(region, share.file);
  if (!file) {
    // Half of the places are kept for those that are mapped.
    const auto others = static_cast<std::size_t>(std::ranges::count_if(handed_, &Handed::in_place));
    if (!in_place || others >= tcp::PeerMemory::max_mapped / 2) {
      return std::nullopt;
    }
  }
  handed_.push_back({region.number, share.address, region.size, !file});
  if (file) {
    socket.pass(std::move(file));
  }
  return share;
}

KVFERRY_INLINE bool HandedRegions::answered(std::uint32_t number, std::uint32_t status) {
  const auto it = std::ranges::find(handed_, number, &Handed::number);
  if (it == handed_.end() || it->answered) {
    return false;
  }
  it->answered = true;
  it->mapped = status == 0 && !it->gone && !it->in_place;
  mapped_ += it->mapped ? 1U : 0U;
  {
    const std::lock_guard lock(mutex_);
    told_mapped_ = mapped_;
    if (status != 0 && !it->in_place && refused_++ == 0) {
      why_not_ = "region " + std::to_string(number) + ": " + std::generic_category().message(static_cast<int>(status)) +
                 " at the peer";
    }
  }
  if (status != 0 || it->gone) {
    handed_.erase(it);
  }
  return true;
}

KVFERRY_INLINE void HandedRegions::unshare(std::uint32_t number) {
  const auto it = std::ranges::find(handed_, number, &Handed::number);
  if (it == handed_.end()) {
    return;
  }
  if (!it->answered) {
    it->gone = true;  // the answer is awaited still
    return;
  }
  mapped_ -= it->mapped ? 1U : 0U;
  handed_.erase(it);
  const std::lock_guard lock(mutex_);
  told_mapped_ = mapped_;
}

KVFERRY_INLINE bool HandedRegions::cover(std::span<const tcp::Reference> references) {
  const Handed* last = nullptr;
  return std::ranges::all_of(references, [&](const tcp::Reference& reference) {
    const auto covers = [&](const Handed& one) { return one.mapped && lies_within(one.address, one.size, reference); };
    if (last == nullptr || !covers(*last)) {
      const auto it = std::ranges::find_if(handed_, covers);
      last = it == handed_.end() ? nullptr : &*it;
    }
    return last != nullptr;
  });
}

KVFERRY_INLINE std::string HandedRegions::path() const {
  const std::lock_guard lock(mutex_);
  if (told_mapped_ == 0 && refused_ == 0) {
    return {};  // nothing was handed out, or not yet
  }
  return "; the peer maps " + std::to_string(told_mapped_) + " of this side's regions" +
         (refused_ == 0 ? "" : ", " + std::to_string(refused_) + " stay unmapped (" + why_not_ + ")");
}

KVFERRY_INLINE std::uint32_t MappedRegions::map(const RemoteRegion& region, const Share& share, bool in_place,
                                                UnixSocket& socket) {
  Region added;
  added.way = share.file == 0 ? Way::in_place : Way::mapped;
  PassedDescriptor passed = share.file == 0 ? PassedDescriptor() : socket.take_passed(share.file);
  int error = 0;
  if (regions_.size() >= tcp::PeerMemory::max_mapped || region.number < next_) {
    error = EINVAL;
  } else if (added.way == Way::in_place) {
    error = in_place ? 0 : EPERM;
  } else {
    error = passed.file ? MappedFile::map(std::move(passed), region.size, added.file) : EBADF;
  }
  if (error == 0) {
    // Nobody writes there: the lists are asked for reads alone.
    added.region.data = added.way == Way::mapped
                            ? const_cast<std::byte*>(added.file.data())
                            : reinterpret_cast<std::byte*>(  // NOLINT(performance-no-int-to-ptr): another process's
                                  static_cast<std::uintptr_t>(share.address));
    added.region.size = static_cast<std::size_t>(region.size);
    added.region.page_size = static_cast<std::size_t>(region.page_size);
    added.region.peer_access = Access::read;
    added.region.number = region.number;
    added.address = share.address;
    by_file_ |= added.file.descriptor() != -1;
    regions_.push_back(std::move(added));
    next_ = region.number + 1;
    make_lists();
  }
  const std::lock_guard lock(mutex_);
  told_ = list(Way::mapped).all().size();
  if (error != 0) {
    why_not_ = "region " + std::to_string(region.number) + ": " + std::generic_category().message(error);
  }
  return static_cast<std::uint32_t>(error);
}

KVFERRY_INLINE void MappedRegions::unmap(std::uint32_t number) {
  if (std::erase_if(regions_, [&](const Region& one) { return one.region.number == number; }) == 0) {
    return;
  }
  make_lists();
  const std::lock_guard lock(mutex_);
  told_ = list(Way::mapped).all().size();
}

KVFERRY_INLINE void MappedRegions::make_lists() {
  std::uint64_t low_numbers = 0;
  for (const auto way : {Way::mapped, Way::in_place}) {
    std::vector<LocalRegion> regions;
    for (const Region& one : regions_) {
      if (one.way == way) {
        regions.push_back(one.region);
        low_numbers |= one.region.number < 64 ? std::uint64_t{1} << one.region.number : 0;
      }
    }
    lists_[static_cast<std::size_t>(way)] = std::make_unique<const kit::RegionList>(std::move(regions), next_, 0);
  }
  low_numbers_.store(low_numbers, std::memory_order_relaxed);
}

KVFERRY_INLINE bool MappedRegions::find(std::span<const tcp::Reference> references, std::vector<iovec>& pieces) const {
  pieces.clear();
  const Region* last = nullptr;
  return any() && std::ranges::all_of(references, [&](const tcp::Reference& reference) {
           const auto covers = [&](const Region& one) {
             return one.way == Way::mapped && lies_within(one.address, one.region.size, reference);
           };
           if (last == nullptr || !covers(*last)) {
             const auto it = std::ranges::find_if(regions_, covers);
             last = it == regions_.end() ? nullptr : &*it;
           }
           if (last != nullptr) {
             const auto offset = static_cast<std::size_t>(offset_from(last->address, reference.address));
             pieces.push_back({last->region.data + offset, static_cast<std::size_t>(reference.length)});
           }
           return last != nullptr;
         });
}

KVFERRY_INLINE const MappedRegions::Region* MappedRegions::with_file(const iovec& piece) const {
  const auto region = std::ranges::find_if(regions_, [&](const Region& one) {
    return one.file.descriptor() != -1 &&
           lies_within(reinterpret_cast<std::uintptr_t>(one.region.data), one.region.size,
                       {reinterpret_cast<std::uintptr_t>(piece.iov_base), piece.iov_len});
  });
  return region == regions_.end() ? nullptr : &*region;
}

/// Each region in the way that the kernel allowed when it was mapped: a filter for system calls may have come later, or have
/// been another thread's.
KVFERRY_INLINE tcp::PeerMemory::Fetched MappedRegions::read(std::span<const iovec> from, std::span<const iovec> to,
                                                            std::error_code& ec) const {
  using Fetched = tcp::PeerMemory::Fetched;
  Pieces<iovec> sources(from);
  Pieces<iovec> destinations(to);
  std::array<iovec, most_pieces> here;
  std::array<iovec, most_pieces> there;
  while (!sources.empty() && !destinations.empty()) {
    ssize_t got = 0;
    const iovec source = sources.front();
    if (const Region* const kept = by_file_ ? with_file(source) : nullptr) {
      const std::size_t count = destinations.next(here, source.iov_len);
      got = ::preadv(kept->file.descriptor(), here.data(), static_cast<int>(count),
                     static_cast<off_t>(static_cast<const std::byte*>(source.iov_base) - kept->region.data));
    } else {
      const std::size_t count = destinations.next(here);
      got = ::process_vm_readv(::gettid(), here.data(), count, there.data(), sources.next(there), 0);
    }
    if (got > 0) {
      sources.use(static_cast<std::size_t>(got));
      destinations.use(static_cast<std::size_t>(got));
    } else if (got == 0 || errno == EFAULT) {
      return Fetched::unwritable;
    } else if (errno != EINTR) {
      ec = {errno, std::system_category()};
      return Fetched::failed;
    }
  }
  return Fetched::all;
}

KVFERRY_INLINE std::string MappedRegions::path() const {
  const std::lock_guard lock(mutex_);
  if (told_ == 0 && why_not_.empty()) {
    return {};
  }
  return "; " + std::to_string(told_) + " of the peer's regions mapped" +
         (why_not_.empty() ? "" : ", one failed (" + why_not_ + ")");
}

}  // namespace kvferry::shm
