// SPDX-License-Identifier: Apache-2.0
#include "rail_domain.hpp"

#include <fcntl.h>

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

void ChannelRegion::keep_dmabuf() {
  if (region_.dmabuf_fd == -1) {
    return;
  }
  dmabuf_.reset(::fcntl(region_.dmabuf_fd, F_DUPFD_CLOEXEC, 0));
  if (!dmabuf_) {
    const auto error = last_verbs_error();
    throw TransferError(error, "region " + std::to_string(region_.number) + ": the descriptor " +
                                   std::to_string(region_.dmabuf_fd) + " of its dma-buf can't be duplicated: " +
                                   error.message());
  }
  region_.dmabuf_fd = dmabuf_.get();
}

RailDomain::Registered RailDomain::make_registered(const std::shared_ptr<const ChannelRegion>& of) const {
  const LocalRegion& region = of->get();
  int access = IBV_ACCESS_LOCAL_WRITE;
  access |= allows(region.peer_access, Access::write) ? IBV_ACCESS_REMOTE_WRITE : 0;
  access |= allows(region.peer_access, Access::read) ? IBV_ACCESS_REMOTE_READ : 0;
  const bool is_device_memory = region.dmabuf_fd != -1;
  Registered registered;
  registered.memory.region = of;
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
    registered.memory.slices.push_back(std::move(slice));
  }
  return registered;
}

void RailDomain::enter(std::uint32_t number, Registered&& registered) {
  const std::lock_guard lock(regions_mutex_);
  if (!ended_) {
    registered_.try_emplace(number, std::move(registered));
  }
}

bool RailDomain::ended() const {
  const std::lock_guard lock(regions_mutex_);
  return ended_;
}

void RailDomain::deregister_region(std::uint32_t number) {
  const std::shared_lock at_work(at_work_);
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
  {
    const std::lock_guard lock(regions_mutex_);
    ended_ = true;  // so that nobody begins to register anything here
  }
  const std::lock_guard alone(at_work_);
  for (std::uint32_t next = 0;;) {
    Registered::Memory gone;  // not to be let go with the regions' lock held
    const std::lock_guard lock(regions_mutex_);
    const auto it = registered_.lower_bound(next);
    if (it == registered_.end()) {
      return;
    }
    std::swap(gone, it->second.memory);
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
  std::vector<RailDomain::Registered> tried;  // kept until the last one is: they have to be registered together
  for (const LocalRegion& region : numbered->all()) {
    const Known known = make_known(region);
    auto registered = first->make_registered(known.region);
    if (use_ == RailDomain::Use::of_channel) {
      first->enter(region.number, std::move(registered));
    } else {
      tried.push_back(std::move(registered));
    }
    regions_.emplace(region.number, known);
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
  auto domain = std::make_shared<RailDomain>(device_, slice_bytes_, use_);
  std::vector<std::weak_ptr<const ChannelRegion>> regions;  // whoever removes one doesn't wait until its turn has come
  {
    // What is added from here on is registered there by whoever adds it.
    const std::lock_guard lock(mutex_);
    if (closed_) {
      throw TransferError(errc::closed, "the channel was closed");
    }
    std::erase_if(domains_, [](const auto& weak) { return weak.expired(); });
    domains_.push_back(domain);
    for (const auto& [number, known] : regions_) {
      regions.emplace_back(known.region);
    }
  }
  for (const auto& weak : regions) {
    if (const auto region = weak.lock()) {
      register_in(*domain, region);
    }
  }
  return domain;
}

RailDomains::Known RailDomains::make_known(const LocalRegion& region) const {
  std::promise<void> gone;
  std::shared_future<void> known_gone = gone.get_future().share();
  const auto known = std::make_shared<ChannelRegion>(region, std::move(gone));
  if (use_ == RailDomain::Use::of_link) {
    known->keep_dmabuf();
  }
  return {known, std::move(known_gone)};
}

/// By more than its number: one that couldn't be registered everywhere leaves its number to the next.
bool RailDomains::is_known(const std::shared_ptr<const ChannelRegion>& region) const {
  const auto it = regions_.find(region->get().number);
  return it != regions_.end() && it->second.region == region;
}

bool RailDomains::register_in(RailDomain& domain, const std::shared_ptr<const ChannelRegion>& region) {
  const std::shared_lock at_work(domain.at_work_);
  if (domain.ended()) {
    return false;
  }
  RailDomain::Registered registered;  // not to be let go with the lock held
  try {
    registered = domain.make_registered(region);
  } catch (const TransferError&) {
    const std::lock_guard lock(mutex_);
    if (is_known(region) && !domain.ended()) {
      throw;
    }
    return false;
  }
  // Whoever removes a region forgets it first, and then goes through the domains.
  const std::lock_guard lock(mutex_);
  if (!is_known(region) || domain.ended()) {
    return false;
  }
  domain.enter(region->get().number, std::move(registered));
  return true;
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
  Known added = make_known(region);
  std::vector<std::shared_ptr<RailDomain>> domains;
  {
    const std::lock_guard lock(mutex_);
    domains = living();
    regions_.insert_or_assign(region.number, added);
  }
  try {
    bool registered = false;
    for (const auto& domain : domains) {
      registered = register_in(*domain, added.region) || registered;
    }
    if (!registered) {
      (void)RailDomain(device_, slice_bytes_, use_).make_registered(added.region);  // whether it can be
    }
  } catch (...) {
    added.region.reset();
    deregister_region(region.number);
    throw;
  }
}

void RailDomains::deregister_region(std::uint32_t number) {
  decltype(regions_)::node_type known;
  std::vector<std::shared_ptr<RailDomain>> domains;
  {
    const std::lock_guard lock(mutex_);
    domains = living();
    known = regions_.extract(number);
  }
  if (known.empty()) {
    return;
  }
  for (const auto& domain : domains) {
    domain->deregister_region(number);
  }
  known.mapped().region.reset();
  known.mapped().gone.wait();  // for who is just registering it, and for domains that are being destroyed
}

void RailDomains::close() {
  std::vector<std::shared_ptr<RailDomain>> domains;
  std::vector<Known> all;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    domains = living();
    for (auto& [number, known] : regions_) {
      all.push_back({std::exchange(known.region, nullptr), known.gone});
    }
  }
  for (const auto& domain : domains) {
    domain->deregister_regions();
  }
  for (Known& known : all) {
    known.region.reset();
    known.gone.wait();
  }
}

}  // namespace kvferry::rdma
