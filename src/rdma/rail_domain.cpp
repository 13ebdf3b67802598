// SPDX-License-Identifier: Apache-2.0
#include "rail_domain.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include <kvferry/error.hpp>

#include "in_parallel.hpp"
#include "message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::size_t staging_blocks = 32;
/// Of a link with a domain of its own.
constexpr std::size_t staging_blocks_of_link = 8;

}  // namespace

RailDomain::RailDomain(std::shared_ptr<RailDevice> device, const RegistrationOptions& options, Use use)
    : device_(std::move(device)), options_(options), use_(use), domain_(ibv_alloc_pd(device_->context())) {
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

MemoryRegionPtr RailDomain::register_slice(const LocalRegion& region, std::size_t begin, std::size_t size,
                                           int access) const {
  const bool is_device_memory = region.dmabuf_fd != -1;
  auto slice = is_device_memory
                   ? MemoryRegionPtr(ibv_reg_dmabuf_mr(domain_.get(), region.dmabuf_offset + begin, size,
                                                       address_of(region.data) + begin, region.dmabuf_fd, access))
                   : register_memory(domain_.get(), region.data + begin, size, access);
  if (slice == nullptr) {
    const auto error = last_verbs_error();
    throw TransferError(error, "region " + std::to_string(region.number) + ": RDMA device '" + device_->name() +
                                   "' can't register " + std::to_string(size) + " bytes of its " +
                                   std::to_string(region.size) + (is_device_memory ? " (a dma-buf)" : "") + ": " +
                                   error.message() + (error.value() == ENOMEM ? ", see ulimit -l" : ""));
  }
  return slice;
}

RailDomain::Registered RailDomain::make_registered(const std::shared_ptr<const ChannelRegion>& of,
                                                   std::size_t threads) const {
  const LocalRegion& region = of->get();
  unsigned access = IBV_ACCESS_LOCAL_WRITE;
  const auto add = [&](bool wanted, unsigned right) { access |= wanted ? right : 0U; };
  add(allows(region.peer_access, Access::write), IBV_ACCESS_REMOTE_WRITE);
  add(allows(region.peer_access, Access::read), IBV_ACCESS_REMOTE_READ);
  add(options_.relaxed_ordering, IBV_ACCESS_RELAXED_ORDERING);
  Registered registered;
  registered.memory.region = of;
  RegionKeys& keys = registered.keys;
  keys.number = region.number;
  if (region.peer_access != Access::none) {
    keys.address = address_of(region.data);
    keys.slice_bytes = options_.slice_bytes;
  }
  auto& slices = registered.memory.slices;
  slices.resize((region.size + options_.slice_bytes - 1) / options_.slice_bytes);
  const auto size_of = [&](std::size_t i) {
    return std::min(options_.slice_bytes, region.size - i * options_.slice_bytes);
  };
  in_parallel(threads, slices.size(), [&](std::size_t i) {
    slices[i] = register_slice(region, i * options_.slice_bytes, size_of(i), static_cast<int>(access));
  });
  for (std::size_t i = 0; i < slices.size(); ++i) {
    const std::uint64_t address = address_of(region.data) + i * options_.slice_bytes;
    registered.slices.push_back({address, address + size_of(i), slices[i]->lkey, slices[i]->rkey,
                                 (access & IBV_ACCESS_REMOTE_WRITE) != 0, region.dmabuf_fd != -1});
    if (region.peer_access != Access::none) {
      keys.keys.push_back(slices[i]->rkey);
    }
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

std::size_t RailDomains::threads_for(std::size_t bytes) const noexcept {
  return bytes < RegistrationOptions::large ? 1 : options_.threads;
}

RailDomains::RailDomains(std::shared_ptr<RailDevice> device, std::span<const MemoryRegion> regions,
                         const RegistrationOptions& options, RailDomain::Use use)
    : device_(std::move(device)), options_(options), use_(use) {
  const auto numbered = kit::RegionList::of(regions);
  const auto first = std::make_shared<RailDomain>(device_, options_, use_);
  std::vector<Known> known;
  std::size_t bytes = 0;
  for (const LocalRegion& region : numbered->all()) {
    known.push_back(make_known(region));
    bytes += region.size;
  }
  // All of them, before any is let go of: they have to be registered together.
  std::vector<RailDomain::Registered> registered(known.size());
  const std::size_t threads = threads_for(bytes);
  in_parallel(threads, known.size(),
              [&](std::size_t i) { registered[i] = first->make_registered(known[i].region, threads / known.size()); });
  for (std::size_t i = 0; i < known.size(); ++i) {
    const std::uint32_t number = known[i].region->get().number;
    if (use_ == RailDomain::Use::of_channel) {
      first->enter(number, std::move(registered[i]));
    }
    regions_.emplace(number, known[i]);
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
  auto domain = std::make_shared<RailDomain>(device_, options_, use_);
  std::vector<std::weak_ptr<const ChannelRegion>> regions;  // whoever removes one doesn't wait until its turn has come
  std::size_t bytes = 0;
  {
    // Regions that are added from here on are registered there by the calls that add them.
    const std::lock_guard lock(mutex_);
    if (closed_) {
      throw TransferError(errc::closed, "the channel was closed");
    }
    std::erase_if(domains_, [](const auto& weak) { return weak.expired(); });
    domains_.push_back(domain);
    for (const auto& [number, known] : regions_) {
      regions.emplace_back(known.region);
      bytes += known.region->get().size;
    }
  }
  const std::size_t threads = threads_for(bytes);
  in_parallel(threads, regions.size(), [&](std::size_t i) {
    if (const auto region = regions[i].lock()) {
      register_in(*domain, region, threads / regions.size());
    }
  });
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

bool RailDomains::register_in(RailDomain& domain, const std::shared_ptr<const ChannelRegion>& region,
                              std::size_t threads) {
  const std::shared_lock at_work(domain.at_work_);
  if (domain.ended()) {
    return false;
  }
  RailDomain::Registered registered;  // not to be let go with the lock held
  try {
    registered = domain.make_registered(region, threads);
  } catch (const TransferError&) {
    const std::lock_guard lock(mutex_);
    if (is_known(region) && !domain.ended()) {
      throw;
    }
    return false;
  }
  // A removal forgets the region first, and then goes through the domains.
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
  const std::size_t slices = (region.size - 1) / options_.slice_bytes + 1;
  if (slices > max_region_keys) {
    throw TransferError(errc::resource_limit, "region " + std::to_string(region.number) + ": " +
                                                  std::to_string(region.size) + " bytes are " + std::to_string(slices) +
                                                  " slices of " + std::to_string(options_.slice_bytes) + ", at most " +
                                                  std::to_string(max_region_keys) + " in a region that comes later");
  }
  Known added = make_known(region);
  std::vector<std::shared_ptr<RailDomain>> domains;
  {
    const std::lock_guard lock(mutex_);
    domains = living();
    regions_.insert_or_assign(region.number, added);
  }
  const std::size_t threads = threads_for(region.size);
  try {
    bool registered = false;
    for (const auto& domain : domains) {
      registered = register_in(*domain, added.region, threads) || registered;
    }
    if (!registered) {
      (void)RailDomain(device_, options_, use_).make_registered(added.region, threads);  // whether it can be
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
