// SPDX-License-Identifier: Apache-2.0
#include "work_planner.hpp"

#include <algorithm>

namespace kvferry::inline KVFERRY_ABI::rdma {

std::size_t WorkPlanner::plan(WorkList& list, ibv_wr_opcode opcode, const RequestLimits& limits,
                              std::size_t max_requests, std::size_t max_bytes, const SliceTable& own,
                              const SliceTable* borrowed) {
  std::size_t planned = 0;
  std::size_t requests = 0;
  std::uint64_t remote_end = 0;
  std::size_t request_bytes = 0;
  ibv_send_wr* request = nullptr;
  while (!done() && planned < max_bytes) {
    const kit::Blocks::Place within = objects_.place(object_, offset_);
    const std::uint64_t local = address_of(objects_.objects()[object_].data()) + within.position;
    const Slice* slice = borrowed == nullptr ? nullptr : borrowed->find(local, hint_);
    if (slice == nullptr) {
      slice = own.find(local, hint_);
    }
    const auto remote = remote_.place(object_, offset_);
    const bool joins = request != nullptr && remote.address == remote_end && remote.key == request->wr.rdma.rkey &&
                       request_bytes < limits.bytes;
    bool new_piece = true;
    if (joins) {
      const ibv_sge& last = list.last_piece();
      new_piece = last.addr + last.length != local || last.lkey != slice->local_key;
    }
    const bool needs_request = !joins || (new_piece && static_cast<std::size_t>(request->num_sge) == limits.pieces);
    if ((needs_request && (requests == max_requests || !list.has_request())) || (new_piece && !list.has_piece())) {
      break;
    }
    if (needs_request) {
      request = &list.add_request(opcode);
      request->wr.rdma.remote_addr = remote.address;
      request->wr.rdma.rkey = remote.key;
      request_bytes = 0;
      ++requests;
    }
    const std::size_t length = static_cast<std::size_t>(std::min(
        {within.available, remote.available, slice->end - local, std::uint64_t{limits.bytes - request_bytes}}));
    if (new_piece) {
      list.add_piece(local, length, slice->local_key);
    } else {
      list.last_piece().length += static_cast<std::uint32_t>(length);
    }
    request_bytes += length;
    remote_end = remote.address + length;
    planned += length;
    offset_ += length;
    skip_empty();
  }
  (opcode == IBV_WR_RDMA_READ ? list.bytes_read : list.bytes_written) += planned;
  return planned;
}

}  // namespace kvferry::rdma
