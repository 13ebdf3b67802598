// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/secret.hpp>
#include <kvferry/shm/region_exchange.hpp>
#include <kvferry/shm/shared_areas.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/tcp/hello.hpp>
#include <kvferry/tcp/lane_traffic.hpp>
#include <kvferry/tcp/peer_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// Whether one process can read another's memory: 0, an errno of process_vm_readv(2) or of opening /proc/PID/mem, or one
/// of these.
/// Travels in greetings.
struct Reach {
  static constexpr std::uint32_t unknown = 0x10000;
  static constexpr std::uint32_t switched_off = 0x10001;
  static constexpr std::uint32_t other_namespace = 0x10002;  ///< Of process ids.
  static constexpr std::uint32_t other_process = 0x10003;    ///< The memory there is another process's.
  static constexpr std::uint32_t other_user = 0x10004;       ///< This process may have rights that the peer lacks.

  std::uint32_t value = unknown;

  [[nodiscard]] bool possible() const noexcept { return value == 0; }
  /// The reason why not, for people; takes the system's settings into account.
  [[nodiscard]] std::string reason() const;
};

/// Bytes in this process's memory. By them a peer finds out whether it reads this process's memory. They never change
/// while the process lives.
[[nodiscard]] const tcp::Secret& proof_of_memory();

/// The bytes that didn't go through the sockets of a channel.
struct MemoryTraffic {
  tcp::LaneTraffic read;    ///< From the memory of processes.
  tcp::LaneTraffic mapped;  ///< From regions that are mapped.
};

/// A process whose memory may be readable, or parts of it mapped.
class ProcessMemory final : public tcp::PeerMemory {
 public:
  ProcessMemory(std::int64_t pid, std::uint64_t least_bytes, std::shared_ptr<MemoryTraffic> traffic)
      : pid_(pid), least_bytes_(least_bytes), traffic_(std::move(traffic)) {}

  /// Reads the peer's proof at its address. Called once, before the link begins.
  [[nodiscard]] Reach try_to_read(const OpenMemory& memory, const tcp::Secret& proof);
  /// The facts that are known when the link begins.
  void begin(const std::shared_ptr<UnixSocket>& socket, bool readable, bool read_by_peer);

  [[nodiscard]] bool fetches() const noexcept override { return readable_ || mapped_.any(); }
  [[nodiscard]] bool refers() const noexcept override { return read_by_peer_ || handed_.any(); }
  [[nodiscard]] std::uint64_t least_bytes() const noexcept override;
  [[nodiscard]] bool refer(std::span<const tcp::Reference> references, std::uint64_t bytes) override;
  [[nodiscard]] Fetched fetch(std::span<const tcp::Reference> from, std::span<const iovec> to,
                              std::error_code& ec) override;

  [[nodiscard]] std::optional<Share> share(const LocalRegion& region) override;
  [[nodiscard]] bool mapped_by_peer(std::uint32_t number, std::uint32_t status) override {
    return handed_.answered(number, status);
  }
  void unshare(std::uint32_t number) override { handed_.unshare(number); }
  [[nodiscard]] std::uint32_t map(const RemoteRegion& region, const Share& share) override;
  void unmap(std::uint32_t number) override { mapped_.unmap(number); }
  [[nodiscard]] const kit::RegionList& regions(Way way) const noexcept override { return mapped_.list(way); }
  [[nodiscard]] bool reads(std::uint32_t number) const noexcept override { return mapped_.reads(number); }
  [[nodiscard]] Fetched copy(Way way, std::span<const iovec> from, std::span<const iovec> to,
                             std::error_code& ec) override;
  [[nodiscard]] bool surely_there(std::span<const iovec> pieces) override { return areas_.cover(pieces); }
  [[nodiscard]] std::string path() const override;

 private:
  template <class Entry>
  [[nodiscard]] Fetched read_in_place(std::span<const Entry> from, std::span<const iovec> to,
                                      std::error_code& ec) const;
  template <class Entry>
  [[nodiscard]] Fetched read(std::span<const Entry> from, std::span<const iovec> to, std::error_code& ec) const;
  [[nodiscard]] Fetched copy_mapped(UnixSocket::Copied copied, std::span<const iovec> from, std::span<const iovec> to,
                                    bool own, std::error_code& ec);
  [[nodiscard]] Fetched behind_copy(UnixSocket::Copied copied, Fetched fetched, std::error_code& ec) const;

  const std::int64_t pid_;
  const std::uint64_t least_bytes_;
  const std::shared_ptr<MemoryTraffic> traffic_;
  std::weak_ptr<UnixSocket> socket_;  ///< The lane closes it.
  bool by_rings_ = false;
  bool readable_ = false;
  bool read_by_peer_ = false;
  HandedRegions handed_;
  MappedRegions mapped_;
  SharedAreasView areas_;
  std::vector<iovec> mapped_pieces_;
};

}  // namespace kvferry::shm
