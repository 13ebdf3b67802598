// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <vector>

#include "rdma/message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

/// The bytes that a peer's messages put into the buffers of this side's recvs, worked out from docs/wire_protocol.md alone,
/// without the library's code.
class RailModel {
 public:
  /// The recv has become known to the peer by this number. @param buffers as they are now.
  void posted(std::uint64_t recv, std::vector<std::vector<std::byte>> buffers) {
    recvs_.try_emplace(recv, Recv{std::move(buffers), 0, 0});
  }
  [[nodiscard]] bool knows(std::uint64_t recv) const { return recvs_.contains(recv); }
  /// The contents that the buffers must have now.
  [[nodiscard]] const std::vector<std::vector<std::byte>>& buffers(std::uint64_t recv) const {
    return recvs_.at(recv).buffers;
  }

  /// Whether a message may put something anywhere.
  [[nodiscard]] static bool concerns(std::span<const std::byte> message) {
    return message.size() >= sizeof(MessageHeader) &&
           message[offsetof(MessageHeader, type)] == static_cast<std::byte>(MessageType::send_data);
  }

  /// A message was handed over.
  void read(std::span<const std::byte> message) {
    if (!concerns(message)) {
      return;
    }
    MessageHeader header;
    std::memcpy(&header, message.data(), sizeof(header));
    const auto recv = recvs_.find(header.operation);
    if (header.magic != MessageHeader::expected_magic || header.body_bytes != message.size() - sizeof(header) ||
        recv == recvs_.end()) {
      return;
    }
    auto body = message.subspan(sizeof(header));
    for (std::uint32_t i = 0; i < header.count && take(recv->second, body); ++i) {
    }
  }

 private:
  struct Recv {
    std::vector<std::vector<std::byte>> buffers;
    std::size_t object = 0;
    std::size_t offset = 0;
  };

  static bool take(Recv& recv, std::span<const std::byte>& body) {
    std::uint64_t entry = 0;
    if (body.size() < sizeof(entry) || recv.object == recv.buffers.size()) {
      return false;
    }
    std::memcpy(&entry, body.data(), sizeof(entry));
    body = body.subspan(sizeof(entry));
    if ((entry & (SentObject::refused | SentObject::direct)) != 0) {
      ++recv.object;
      return recv.offset == 0;
    }
    auto& buffer = recv.buffers[recv.object];
    const std::uint64_t length = entry & SentObject::length_mask;
    if (length > body.size() || length > buffer.size() - recv.offset) {
      return false;
    }
    if (length != 0) {
      std::memcpy(buffer.data() + recv.offset, body.data(), static_cast<std::size_t>(length));
    }
    body = body.subspan(static_cast<std::size_t>(length));
    recv.offset += static_cast<std::size_t>(length);
    if ((entry & SentObject::continues) == 0) {
      ++recv.object;
      recv.offset = 0;
    }
    return true;
  }

  std::map<std::uint64_t, Recv> recvs_;
};

}  // namespace kvferry::rdma::testing
