// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "fuzz/attacked_channel.hpp"
#include "fuzz/frame_maker.hpp"
#include "fuzz/input.hpp"
#include "fuzz/lane_model.hpp"
#include "fuzz/liar.hpp"

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// A peer that says what the input tells it to, at any time, and what it has said.
class LyingPeer {
 public:
  static constexpr std::array<const char*, 3> ids{"liar", "another liar", "honest"};

  LyingPeer(Input& input, AttackedChannel& attacked, LiarsHandshakes& handshakes, LiarsListener& listener)
      : input_(input),
        attacked_(attacked),
        handshakes_(handshakes),
        listener_(listener),
        maker_(input, {AttackedChannel::pages, AttackedChannel::page, AttackedChannel::honest_region}) {}

  [[nodiscard]] const std::vector<LiarsLane>& lanes() const noexcept { return lanes_; }
  /// Whether a handshake gave it the right to say something.
  [[nodiscard]] bool was_accepted() const noexcept { return accepted_; }

  /// A question to the channel, with or without lies.
  void ask() {
    kit::InitQuestion question;
    const std::size_t how = input_.choice(16);
    question.transport = how == 15 ? "rdma" : "tcp";
    question.version = input_.choice(16) == 15 ? input_.number() : kit::protocol_version;
    question.sender_id = ids[input_.choice(16) == 15 ? 2 : input_.choice(2)];
    question.receiver_id = "attacked";
    question.incarnation = incarnation_ = 0x11A5 + input_.choice(4);
    question.init_url = input_.choice(4) == 3 ? std::string() : handshakes_.url();
    const std::size_t regions = input_.choice(4);
    for (std::size_t i = 0; i < regions; ++i) {
      const std::uint64_t page =
          input_.flag() ? AttackedChannel::page : 1 + input_.any_number() % (std::uint64_t{1} << 40);
      const std::uint64_t size = page * (1 + input_.choice(16));
      question.regions.emplace_back(size, page, input_.choice(4));
    }
    tcp::DialEndpoint dials{input_.choice(8) == 7 ? input_.any_number() : 1 + input_.choice(3)};
    if (input_.flag()) {
      question.secret = Bytes(16, static_cast<std::byte>(input_.choice(2)));
    }
    if (input_.choice(4) == 3) {
      question.timeout_ms = input_.any_number();
    }
    if (input_.choice(8) == 7) {
      question.who = input_.flag();
    }
    // The channel has none of either: such a question is refused.
    if (how == 13 || how == 14) {
      dials.encrypted = input_.flag();
      dials.certificate = how == 14 ? std::optional(some_hash()) : std::nullopt;
    }
    question.endpoint = kit::encode_endpoint(dials);
    const bool may_be_accepted = !dials.encrypted.value_or(false) && !dials.certificate;
    // If this id is connected, the channel waits for a second for its peer to say something. Half of them hang up instead.
    const auto hang_up = [this] {
      if (incarnation_ % 2 == 0) {
        close_all();
      }
    };
    const auto encoded = encode_side_message(question).encoded();
    take_answer(handshakes_.ask(attacked_.channel.peer_init_url(), encoded, 250, hang_up), may_be_accepted);
  }

  /// Anything instead of a question.
  void babble() {
    const auto bytes = input_.bytes(input_.number());
    (void)handshakes_.ask(attacked_.channel.peer_init_url(), bytes, 20, [] {});
  }

  /// All lanes that the last answer was about, with their hellos.
  void connect() {
    if (!endpoint_) {
      return;
    }
    const std::size_t first = lanes_.size();
    for (std::size_t i = 0; i < endpoint_->lanes && lanes_.size() < most_lanes; ++i) {
      lanes_.emplace_back(Wire::to(static_cast<std::uint16_t>(endpoint_->port)));
      const tcp::Hello hello = right_hello(i);
      lanes_.back().wire.say(std::as_bytes(std::span(&hello, 1)));
    }
    for (std::size_t i = first; i < lanes_.size(); ++i) {
      hear(i, 250);
    }
  }

  /// A connection whose hello isn't right, or not whole.
  void intrude() {
    if (lanes_.size() == most_lanes) {
      return;
    }
    tcp::Hello hello = right_hello(input_.choice(4));
    auto bytes = std::vector<std::byte>(sizeof(hello));
    std::memcpy(bytes.data(), &hello, sizeof(hello));
    bytes[input_.choice(sizeof(hello))] ^= static_cast<std::byte>(input_.number());
    bytes.resize(input_.flag() ? bytes.size() : input_.choice(sizeof(hello)));
    bytes.resize(bytes.size() + input_.choice(128));
    lanes_.emplace_back(Wire::to(attacked_.channel.data_port()));
    lanes_.back().wire.say(bytes);
    if (bytes.size() > sizeof(hello)) {
      lanes_.back().said.assign(bytes.begin() + sizeof(hello), bytes.end());
    }
  }

  void frame() {
    if (lanes_.empty()) {
      return;
    }
    tcp::FrameHeader header = maker_.header();
    const std::size_t lane = input_.choice(lanes_.size());
    const auto bytes = maker_.with_body(header);
    say(lane, bytes, input_.choice(8) == 7);
  }

  /// Sends an answer, or nearly one, to something that the channel has said.
  void reply() {
    if (heard_.empty()) {
      return;
    }
    const HeardFrame& heard = heard_[heard_.size() - 1 - input_.number() % heard_.size()];
    tcp::FrameHeader header;
    header.operation = heard.header.operation;
    header.flags = heard.header.flags & (tcp::FrameHeader::last_chunk | tcp::FrameHeader::with_checksums);
    std::vector<tcp::Descriptor> descriptors;
    switch (heard.header.type) {
      case tcp::FrameType::write:
      case tcp::FrameType::notify: header.type = tcp::FrameType::write_ack; break;
      case tcp::FrameType::read:
        header.type = tcp::FrameType::read_data;
        header.payload_bytes = heard.header.payload_bytes;
        break;
      case tcp::FrameType::recv_post:
        header.type = tcp::FrameType::send_data;
        header.tag = ++sends_;
        header.flags |= tcp::FrameHeader::last_chunk;
        for (const tcp::Descriptor& buffer : heard.descriptors) {
          descriptors.push_back({buffer.index, std::min<std::uint64_t>(buffer.length, AttackedChannel::page)});
          header.payload_bytes += descriptors.back().length;
        }
        break;
      case tcp::FrameType::send_data:
        header.type = tcp::FrameType::send_ack;
        header.operation = heard.header.tag;
        break;
      case tcp::FrameType::probe: header.type = tcp::FrameType::probe_answer; break;
      case tcp::FrameType::fence: header.type = tcp::FrameType::fence_ack; break;
      default: return;
    }
    header.count = static_cast<std::uint32_t>(descriptors.size());
    const std::size_t lie = input_.choice(16);
    if (lie == 0) {
      header.status = input_.number();
    } else if (lie == 1) {
      header.payload_bytes += input_.flag() ? 1 : std::uint64_t{0} - 1;
    } else if (lie == 2 && !descriptors.empty()) {
      descriptors.back().length += input_.any_number();
    } else if (lie == 3) {
      header.operation += 1 + input_.number();
    } else if (lie == 4 && !descriptors.empty()) {
      descriptors.front().index |= std::uint64_t{input_.choice(4)} << 62;
    }
    say(heard.lane, maker_.bytes_of(header, descriptors), false);
  }

  void raw() {
    if (!lanes_.empty()) {
      const std::size_t lane = input_.choice(lanes_.size());
      say(lane, input_.bytes(input_.number()), false);
    }
  }

  void close() {
    if (!lanes_.empty()) {
      lanes_[input_.choice(lanes_.size())].wire.close(static_cast<Wire::End>(input_.choice(3)));
    }
  }
  void close_all() {
    for (auto& lane : lanes_) {
      lane.wire.close(Wire::End::reset);
    }
  }

  /// Takes what the channel has said.
  void listen(int milliseconds) {
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
      hear(i, milliseconds);
    }
  }

  /// Answers the channel's questions and its data connections.
  void serve() {
    while (auto asked = handshakes_.asked()) {
      answer(*asked);
    }
    while (auto wire = listener_.accept(2)) {
      welcome(std::move(*wire));
    }
  }

 private:
  static constexpr std::size_t most_lanes = 12;

  tcp::Hello right_hello(std::size_t lane) const {
    tcp::Hello hello;
    hello.lane = static_cast<std::uint32_t>(lane);
    if (endpoint_) {
      hello.lane_count = static_cast<std::uint32_t>(endpoint_->lanes);
      std::ranges::copy(endpoint_->dial_secret, hello.secret.begin());
    }
    hello.incarnation = incarnation_;
    return hello;
  }

  /// As SHA-256 has it, or nearly.
  Bytes some_hash() { return Bytes(input_.choice(4) == 3 ? input_.number() : 32, std::byte{3}); }

  void take_answer(const Bytes& bytes, bool may_be_accepted) {
    std::error_code ec;
    const auto message = parse_side_message(bytes, ec);
    const auto answer = ec ? kit::InitAnswer() : decode_side_message<kit::InitAnswer>(message, ec);
    if (ec || answer.status != kit::InitAnswer::ok) {
      return;
    }
    require(may_be_accepted, "who wants encrypted connections gets no others");
    endpoint_ = kit::decode_endpoint<tcp::AcceptEndpoint>(answer.endpoint, ec);
    require(!ec && endpoint_->lanes >= 1 && endpoint_->lanes <= 3, "the channel answers with an endpoint");
    accepted_ = true;
  }

  void hear(std::size_t number, int milliseconds) {
    LiarsLane& lane = lanes_[number];
    const auto bytes = lane.wire.hear(milliseconds);
    lane.heard.insert(lane.heard.end(), bytes.begin(), bytes.end());
    if (!lane.live) {
      tcp::Hello welcome;
      if (lane.heard.size() < sizeof(welcome)) {
        return;
      }
      std::memcpy(&welcome, lane.heard.data(), sizeof(welcome));
      if (welcome.magic != tcp::Hello::accepting) {
        require(welcome.magic == tcp::Hello::come_again, "who isn't welcome is told nothing");
        return;
      }
      require(accepted_, "who was not accepted is not welcomed");
      lane.live = true;
      lane.heard.erase(lane.heard.begin(), lane.heard.begin() + sizeof(welcome));
    }
    for (auto& frame : frames_heard(number, lane)) {
      maker_.heard(frame.header.operation);
      heard_.push_back(std::move(frame));
    }
  }

  /// Says bytes on a lane, unless they might be a write into the honest peer's region: everybody may write there.
  void say(std::size_t number, const std::vector<std::byte>& bytes, bool half) {
    LiarsLane& lane = lanes_[number];
    auto said = lane.said;
    said.insert(said.end(), bytes.begin(),
                half ? bytes.begin() + static_cast<std::ptrdiff_t>(bytes.size() / 2) : bytes.end());
    tcp::testing::LaneModel model({AttackedChannel::honest_region}, AttackedChannel::pages, AttackedChannel::page);
    model.read(said);
    if (model.changes_anything() || said.size() > most_said) {
      return;
    }
    lane.wire.say(std::span(said).subspan(lane.said.size()));
    lane.said = std::move(said);
  }

  void answer(LiarsHandshakes::Asked& asked) {
    std::error_code ec;
    const auto message = parse_side_message(asked.question, ec);
    const auto question = ec ? kit::InitQuestion() : decode_side_message<kit::InitQuestion>(message, ec);
    kit::InitAnswer answer;
    answer.status = input_.choice(8) == 7 ? kit::InitAnswer::yield : kit::InitAnswer::ok;
    if (question.who.value_or(false) && input_.choice(4) != 3) {
      answer.status = kit::InitAnswer::here;
    }
    const std::size_t secured = input_.choice(16);
    answer.version = secured == 15 ? input_.any_number() : kit::protocol_version;
    answer.transport = "tcp";
    answer.incarnation = incarnation_;
    answer.regions = {{AttackedChannel::page * 4, AttackedChannel::page, input_.choice(4)}};
    tcp::AcceptEndpoint endpoint;
    endpoint.host = input_.choice(16) == 15 ? "192.0.2.1" : "";
    endpoint.port = input_.choice(8) == 7 ? input_.any_number() : listener_.port();
    endpoint.lanes = input_.choice(8) == 7 ? input_.any_number() : 1 + input_.choice(3);
    endpoint.dial_secret = Bytes(input_.choice(16) == 15 ? 15 : 16, std::byte{1});
    endpoint.accept_secret = Bytes(16, std::byte{2});
    if (secured >= 11 && secured <= 14) {
      endpoint.tls_identity = secured != 11 ? std::optional(Bytes(16, std::byte{4})) : std::nullopt;
      endpoint.tls_secret = secured == 12 || secured == 13 ? std::optional(Bytes(32, std::byte{5})) : std::nullopt;
      endpoint.certificate = secured != 12 ? std::optional(some_hash()) : std::nullopt;
    }
    answer.endpoint = kit::encode_endpoint(endpoint);
    const std::size_t how = input_.choice(16);
    if (how == 15) {
      handshakes_.answer(asked, input_.bytes(input_.number()));
    } else if (how != 14) {
      accepted_ = true;
      handshakes_.answer(asked, encode_side_message(answer).encoded());
    }
  }

  void welcome(Wire wire) {
    const auto bytes = wire.hear(100);
    tcp::Hello hello;
    if (bytes.size() != sizeof(hello) || lanes_.size() == most_lanes) {
      return;
    }
    std::memcpy(&hello, bytes.data(), sizeof(hello));
    require(hello.magic == tcp::Hello::dialing && hello.secret == tcp::Secret(filled(std::byte{1})),
            "the channel shows the secret that it was told");
    hello.magic = tcp::Hello::accepting;
    hello.incarnation = incarnation_;
    hello.secret = filled(std::byte{2});
    const std::size_t how = input_.choice(16);
    if (how == 15) {
      hello.magic = again_ ? 0 : tcp::Hello::come_again;
      again_ = true;  // once is enough: each takes its time
    } else if (how == 14) {
      hello.secret[input_.choice(16)] = std::byte{3};
    } else if (how == 13) {
      hello.lane += input_.number();
    } else if (how == 12) {
      return;
    }
    wire.say(std::as_bytes(std::span(&hello, 1)));
    lanes_.emplace_back(std::move(wire), true);
  }

  static tcp::Secret filled(std::byte byte) {
    tcp::Secret secret;
    secret.fill(byte);
    return secret;
  }

  static constexpr std::size_t most_said = std::size_t{32} << 10;

  Input& input_;
  AttackedChannel& attacked_;
  LiarsHandshakes& handshakes_;
  LiarsListener& listener_;
  FrameMaker maker_;
  std::vector<LiarsLane> lanes_;
  std::vector<HeardFrame> heard_;
  std::optional<tcp::AcceptEndpoint> endpoint_;
  std::uint64_t incarnation_ = 0x11A5;
  std::uint64_t sends_ = 0;
  bool accepted_ = false;
  bool again_ = false;
};

}  // namespace kvferry::inline KVFERRY_ABI::fuzz
