// SPDX-License-Identifier: Apache-2.0
#include "rail_domain.hpp"

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include <kvferry/error.hpp>

#include "message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::size_t staging_blocks = 32;
/// Of a link with a domain of its own.
constexpr std::size_t staging_blocks_of_link = 8;

}  // namespace

RailDomain::RailDomain(std::shared_ptr<RailDevice> device, std::size_t slice_bytes, Use use)
    : device_(std::move(device)), slice_bytes_(slice_bytes), use_(use), domain_(ibv_alloc_pd(device_->context())) {
  if (domain_ == nullptr) {
    throw TransferError(last_verbs_error(), "RDMA device '" + device_->name() + "': no protection domain");
  }
}

RailDomain::Registered RailDomain::make_registered(const LocalRegion& region) const {
  int access = IBV_ACCESS_LOCAL_WRITE;
  access |= allows(region.peer_access, Access::write) ? IBV_ACCESS_REMOTE_WRITE : 0;
  access |= allows(region.peer_access, Access::read) ? IBV_ACCESS_REMOTE_READ : 0;
  const bool is_device_memory = region.dmabuf_fd != -1;
  Registered registered;
  RegionKeys& keys = registered.keys;
  keys.number = region.number;
  if (region.peer_access != Access::none) {
    keys.address = address_of(region.data);
    keys.slice_bytes = slice_bytes_;
  }
  for (std::size_t begin = 0; begin < region.size; begin += slice_bytes_) {
    const std::size_t size = std::min(slice_bytes_, region.size - begin);
    const std::uint64_t address = address_of(region.data) + begin;
    auto slice = is_device_memory ? MemoryRegionPtr(ibv_reg_dmabuf_mr(domain_.get(), region.dmabuf_offset + begin, size,
                                                                      address, region.dmabuf_fd, access))
                                  : register_memory(domain_.get(), region.data + begin, size, access);
    if (slice == nullptr) {
      const auto error = last_verbs_error();
      throw TransferError(error, "region " + std::to_string(region.number) + ": RDMA device '" + device_->name() +
                                     "' can't register " + std::to_string(size) + " bytes of its " +
                                     std::to_string(region.size) + (is_device_memory ? " (a dma-buf)" : "") + ": " +
                                     error.message() + (error.value() == ENOMEM ? ", see ulimit -l" : ""));
    }
    registered.slices.push_back(
        {address, address + size, slice->lkey, slice->rkey, (access & IBV_ACCESS_REMOTE_WRITE) != 0, is_device_memory});
    if (region.peer_access != Access::none) {
      keys.keys.push_back(slice->rkey);
    }
    registered.memory.push_back(std::move(slice));
  }
  return registered;
}

void RailDomain::enter(std::uint32_t number, Registered registered) {
  const std::lock_guard lock(regions_mutex_);
  if (!ended_) {
    registered_.insert_or_assign(number, std::move(registered));
  }
}

void RailDomain::deregister_region(std::uint32_t number) {
  decltype(registered_)::node_type gone;  // not to be let go with the lock held: it takes its time
  const std::lock_guard lock(regions_mutex_);
  gone = registered_.extract(number);
}

void RailDomain::link_ended() {
  if (use_ == Use::of_link) {
    deregister_regions();
  }
}

void RailDomain::deregister_regions() {
  const std::lock_guard ending(ending_mutex_);
  for (std::uint32_t next = 0;;) {
    std::vector<MemoryRegionPtr> gone;  // not to be let go with the regions' lock held
    const std::lock_guard lock(regions_mutex_);
    ended_ = true;
    const auto it = registered_.lower_bound(next);
    if (it == registered_.end()) {
      return;
    }
    gone.swap(it->second.memory);
    next = it->first + 1;
  }
}

std::vector<RegionKeys> RailDomain::region_keys() const {
  const std::lock_guard lock(regions_mutex_);
  std::vector<RegionKeys> all;
  all.reserve(registered_.size());
  for (const auto& [number, registered] : registered_) {
    all.push_back(registered.keys);
  }
  return all;
}

std::optional<RegionKeys> RailDomain::keys_of(std::uint32_t number) const {
  const std::lock_guard lock(regions_mutex_);
  const auto it = registered_.find(number);
  return it == registered_.end() ? std::nullopt : std::optional(it->second.keys);
}

void RailDomain::list_regions(std::shared_ptr<const kit::RegionList> now) {
  auto slices = std::make_shared<SliceTable>();
  for (const LocalRegion& region : now->all()) {
    if (const auto it = registered_.find(region.number); it != registered_.end()) {
      for (const Slice& slice : it->second.slices) {
        slices->add(slice);
      }
    }
  }
  slices_ = std::move(slices);
  known_ = std::move(now);
}

std::unique_ptr<RailDomain::StagingBlock> RailDomain::take_staging_block(std::size_t bytes) {
  if (bytes > StagingBlock::size) {
    return nullptr;
  }
  const std::lock_guard lock(staging_mutex_);
  if (!staging_made_) {
    const std::size_t blocks = use_ == Use::of_link ? staging_blocks_of_link : staging_blocks;
    staging_ = RegisteredBuffer(domain_.get(), blocks * StagingBlock::size);
    staging_made_ = true;
    for (std::size_t i = 0; i < blocks; ++i) {
      free_blocks_.push_back(i);
    }
  }
  if (free_blocks_.empty()) {
    return nullptr;
  }
  auto block = std::make_unique<StagingBlock>(*this, free_blocks_.back());
  free_blocks_.pop_back();
  return block;
}

RailDomain::StagingBlock::~StagingBlock() {
  const std::lock_guard lock(domain_.staging_mutex_);
  domain_.free_blocks_.push_back(number_);
}

RailDomains::RailDomains(std::shared_ptr<RailDevice> device, std::span<const MemoryRegion> regions,
                         std::size_t slice_bytes, RailDomain::Use use)
    : device_(std::move(device)), slice_bytes_(slice_bytes), use_(use) {
  const auto numbered = kit::RegionList::of(regions);
  const auto first = std::make_shared<RailDomain>(device_, slice_bytes_, use_);
  for (const LocalRegion& region : numbered->all()) {
    auto registered = first->make_registered(region);
    if (use_ == RailDomain::Use::of_channel) {
      first->enter(region.number, std::move(registered));
    }
    regions_.emplace(region.number, region);
  }
  if (use_ == RailDomain::Use::of_channel) {
    common_ = first;
    domains_.push_back(first);
  }
}

std::shared_ptr<RailDomain> RailDomains::for_link() {
  if (common_) {
    return common_;
  }
  const auto domain = std::make_shared<RailDomain>(device_, slice_bytes_, use_);
  std::vector<LocalRegion> regions;
  {
    // What is added from here on is registered there by whoever adds it.
    const std::lock_guard lock(mutex_);
    if (closed_) {
      throw TransferError(errc::closed, "the channel was closed");
    }
    std::erase_if(domains_, [](const auto& weak) { return weak.expired(); });
    domains_.push_back(domain);
    for (const auto& [number, region] : regions_) {
      regions.push_back(region);
    }
  }
  for (const LocalRegion& region : regions) {
    register_in(*domain, region);
  }
  return domain;
}

void RailDomains::register_in(RailDomain& domain, const LocalRegion& region) {
  auto registered = domain.make_registered(region);
  // Whoever removes a region forgets it first, and then goes through the domains.
  const std::lock_guard lock(mutex_);
  if (regions_.contains(region.number)) {
    domain.enter(region.number, std::move(registered));
  }
}

std::vector<std::shared_ptr<RailDomain>> RailDomains::living() {
  std::vector<std::shared_ptr<RailDomain>> all;
  for (const auto& weak : domains_) {
    if (auto domain = weak.lock()) {
      all.push_back(std::move(domain));
    }
  }
  return all;
}

void RailDomains::register_region(const LocalRegion& region) {
  const std::size_t slices = (region.size - 1) / slice_bytes_ + 1;
  if (slices > max_region_keys) {
    throw TransferError(errc::resource_limit, "region " + std::to_string(region.number) + ": " +
                                                  std::to_string(region.size) + " bytes are " + std::to_string(slices) +
                                                  " slices of " + std::to_string(slice_bytes_) + ", at most " +
                                                  std::to_string(max_region_keys) + " in a region that comes later");
  }
  std::vector<std::shared_ptr<RailDomain>> domains;
  {
    const std::lock_guard lock(mutex_);
    domains = living();
    regions_.insert_or_assign(region.number, region);
  }
  try {
    if (domains.empty()) {
      (void)RailDomain(device_, slice_bytes_, use_).make_registered(region);
    }
    for (const auto& domain : domains) {
      register_in(*domain, region);
    }
  } catch (...) {
    deregister_region(region.number);
    throw;
  }
}

void RailDomains::deregister_region(std::uint32_t number) {
  std::vector<std::shared_ptr<RailDomain>> domains;
  {
    const std::lock_guard lock(mutex_);
    regions_.erase(number);
    domains = living();
  }
  for (const auto& domain : domains) {
    domain->deregister_region(number);
  }
}

void RailDomains::close() {
  std::vector<std::shared_ptr<RailDomain>> domains;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    domains = living();
  }
  for (const auto& domain : domains) {
    domain->deregister_regions();
  }
}

}  // namespace kvferry::rdma
