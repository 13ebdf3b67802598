// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <infiniband/verbs.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Work requests that are posted by one call, and their gather lists. Made once, filled again and again.
class WorkList {
 public:
  static constexpr std::size_t max_requests = 64;
  static constexpr std::size_t max_pieces = 512;

  void clear() noexcept {
    requests_used_ = 0;
    pieces_used_ = 0;
    bytes_written = 0;
    bytes_read = 0;
  }

  [[nodiscard]] bool empty() const noexcept { return requests_used_ == 0; }
  [[nodiscard]] std::size_t size() const noexcept { return requests_used_; }
  [[nodiscard]] bool has_request() const noexcept { return requests_used_ < max_requests; }
  [[nodiscard]] bool has_piece() const noexcept { return pieces_used_ < max_pieces; }

  /// Adds a request without pieces, not signalled. `add_piece` then adds pieces to it. Without any its list is null: a provider
  /// (irdma) takes the first piece of a list that there is, whatever their number says.
  ibv_send_wr& add_request(ibv_wr_opcode opcode) noexcept {
    ibv_send_wr& request = requests_[requests_used_++];
    request = ibv_send_wr{};
    request.opcode = opcode;
    return request;
  }
  void add_piece(std::uint64_t address, std::size_t length, std::uint32_t key) noexcept {
    ibv_sge& piece = pieces_[pieces_used_++];
    piece = {address, static_cast<std::uint32_t>(length), key};
    ibv_send_wr& request = requests_[requests_used_ - 1];
    if (request.num_sge++ == 0) {
      request.sg_list = &piece;
    }
  }
  [[nodiscard]] ibv_sge& last_piece() noexcept { return pieces_[pieces_used_ - 1]; }
  [[nodiscard]] ibv_send_wr& operator[](std::size_t i) noexcept { return requests_[i]; }
  [[nodiscard]] const ibv_send_wr& operator[](std::size_t i) const noexcept { return requests_[i]; }

  /// Links the requests and has the last one signalled, which stands for all of them.
  ibv_send_wr* finish() noexcept {
    for (std::size_t i = 0; i + 1 < requests_used_; ++i) {
      requests_[i].next = &requests_[i + 1];
    }
    requests_[requests_used_ - 1].send_flags |= IBV_SEND_SIGNALED;
    return requests_.data();
  }

  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_written + bytes_read; }

  std::size_t bytes_written = 0;  ///< By writes and messages.
  std::size_t bytes_read = 0;

 private:
  std::array<ibv_send_wr, max_requests> requests_{};
  std::array<ibv_sge, max_pieces> pieces_{};
  std::size_t requests_used_ = 0;
  std::size_t pieces_used_ = 0;
};

}  // namespace kvferry::rdma
