// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/init_messages.hpp>
#include "fuzz/input.hpp"
#include <kvferry/tcp/frame.hpp>
#include <kvferry/tcp/hello.hpp>

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// A socket of its own on loopback.
class Wire {
 public:
  enum class End { orderly, reset, half };

  explicit Wire(int descriptor) : descriptor_(descriptor) {}
  Wire(Wire&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Wire& operator=(Wire&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Wire() { close(End::reset); }

  [[nodiscard]] static Wire to(std::uint16_t port) {
    Wire wire(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::connect(wire.descriptor_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      wire.close(End::orderly);
    }
    return wire;
  }

  [[nodiscard]] bool is_open() const noexcept { return descriptor_ != -1; }
  void say(std::span<const std::byte> bytes) const {
    if (is_open()) {
      (void)!::send(descriptor_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
  }
  /// The bytes that have come; waits for them for a while.
  [[nodiscard]] std::vector<std::byte> hear(int milliseconds) const {
    std::vector<std::byte> bytes(std::size_t{64} << 10);
    pollfd ready{descriptor_, POLLIN, 0};
    if (!is_open() || ::poll(&ready, 1, milliseconds) <= 0) {
      return {};
    }
    const ssize_t size = ::recv(descriptor_, bytes.data(), bytes.size(), MSG_DONTWAIT);
    bytes.resize(size > 0 ? static_cast<std::size_t>(size) : 0);
    return bytes;
  }
  void close(End end) {
    if (!is_open()) {
      return;
    }
    if (end == End::half) {
      ::shutdown(descriptor_, SHUT_WR);
      return;
    }
    if (end == End::reset) {
      const linger at_once{1, 0};
      ::setsockopt(descriptor_, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
    }
    ::close(std::exchange(descriptor_, -1));
  }

 private:
  int descriptor_ = -1;
};

/// A data connection of the liar's, and all that has been said on it.
struct LiarsLane {
  explicit LiarsLane(Wire connected, bool is_live = false) : wire(std::move(connected)), live(is_live) {}

  Wire wire;
  bool live = false;             ///< The channel has welcomed it, or been welcomed.
  std::vector<std::byte> said;   ///< Behind the hello or welcome.
  std::vector<std::byte> heard;  ///< Likewise, once it is live.
  std::size_t looked_at = 0;
};

/// A frame of the channel on a lane.
struct HeardFrame {
  std::size_t lane = 0;
  tcp::FrameHeader header;
  std::vector<tcp::Descriptor> descriptors;
};

inline std::vector<HeardFrame> frames_heard(std::size_t number, LiarsLane& lane) {
  std::vector<HeardFrame> frames;
  for (;;) {
    const auto left = std::span(lane.heard).subspan(lane.looked_at);
    HeardFrame frame{number, {}, {}};
    if (left.size() < sizeof(frame.header)) {
      return frames;
    }
    std::memcpy(&frame.header, left.data(), sizeof(frame.header));
    require(frame.header.magic == tcp::FrameHeader::expected_magic, "the channel says frames");
    const std::size_t of_descriptors = frame.header.count * sizeof(tcp::Descriptor);
    const std::size_t of_payload = frame.header.type == tcp::FrameType::read ? 0 : frame.header.payload_bytes;
    const std::size_t size = sizeof(frame.header) + of_descriptors + of_payload + frame.header.notification_bytes +
                             frame.header.checksums * sizeof(tcp::Checksum) +
                             (tcp::has_trailer(frame.header) ? sizeof(tcp::FrameTrailer) : 0);
    if (left.size() < size) {
      return frames;
    }
    frame.descriptors.resize(frame.header.count);
    if (of_descriptors != 0) {
      std::memcpy(frame.descriptors.data(), left.data() + sizeof(frame.header), of_descriptors);
    }
    lane.looked_at += size;
    frames.push_back(std::move(frame));
  }
}

/// Where the liar takes handshakes, and asks for them.
class LiarsHandshakes {
 public:
  LiarsHandshakes() : router_(context_, zmq::socket_type::router) {
    router_.set(zmq::sockopt::linger, 0);
    router_.bind("tcp://127.0.0.1:*");
  }

  [[nodiscard]] std::string url() const { return router_.get(zmq::sockopt::last_endpoint); }

  /// @param on_silence called once, if there is no answer at once. @return what the channel at `url` answers within this
  /// time; empty: nothing.
  template <class OnSilence>
  [[nodiscard]] Bytes ask(const std::string& url, std::span<const std::byte> question, int milliseconds,
                          OnSilence on_silence) {
    constexpr int at_once = 20;
    zmq::socket_t dealer(context_, zmq::socket_type::dealer);
    dealer.set(zmq::sockopt::linger, 0);
    dealer.set(zmq::sockopt::rcvtimeo, at_once);
    dealer.connect(url);
    dealer.send(zmq::message_t(), zmq::send_flags::sndmore);
    dealer.send(zmq::buffer(question.data(), question.size()), zmq::send_flags::none);
    zmq::message_t part;
    bool answered = receive(dealer, part);
    if (!answered && milliseconds > at_once) {
      on_silence();
      dealer.set(zmq::sockopt::rcvtimeo, milliseconds - at_once);
      answered = receive(dealer, part);
    }
    return answered && receive(dealer, part) ? bytes_of(part) : Bytes();
  }

  struct Asked {
    zmq::message_t who;
    Bytes question;
  };
  [[nodiscard]] std::optional<Asked> asked() {
    Asked asked;
    zmq::message_t part;
    if (!receive(router_, asked.who, zmq::recv_flags::dontwait)) {
      return std::nullopt;
    }
    while (router_.get(zmq::sockopt::rcvmore) != 0) {
      (void)receive(router_, part);
    }
    asked.question = bytes_of(part);
    return asked;
  }
  void answer(Asked& asked, std::span<const std::byte> bytes) {
    router_.send(asked.who, zmq::send_flags::sndmore);
    router_.send(zmq::message_t(), zmq::send_flags::sndmore);
    router_.send(zmq::buffer(bytes.data(), bytes.size()), zmq::send_flags::dontwait);
  }

 private:
  /// A signal, such as the fuzzer's own alarm, is no reason to give up.
  static bool receive(zmq::socket_t& socket, zmq::message_t& part, zmq::recv_flags flags = zmq::recv_flags::none) {
    for (;;) {
      try {
        return socket.recv(part, flags).has_value();
      } catch (const zmq::error_t& error) {
        if (error.num() != EINTR) {
          throw;
        }
      }
    }
  }

  static Bytes bytes_of(const zmq::message_t& part) {
    const auto* const data = static_cast<const std::byte*>(part.data());
    return {data, data + part.size()};
  }

  zmq::context_t context_;
  zmq::socket_t router_;
};

/// Where the liar takes data connections.
class LiarsListener {
 public:
  LiarsListener() : descriptor_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    require(::bind(descriptor_, reinterpret_cast<const sockaddr*>(&address), size) == 0 &&
                ::listen(descriptor_, 64) == 0 &&
                ::getsockname(descriptor_, reinterpret_cast<sockaddr*>(&address), &size) == 0,
            "the liar can listen");
    port_ = ntohs(address.sin_port);
  }
  LiarsListener(const LiarsListener&) = delete;
  LiarsListener& operator=(const LiarsListener&) = delete;
  ~LiarsListener() { ::close(descriptor_); }

  [[nodiscard]] std::uint16_t port() const noexcept { return port_; }
  [[nodiscard]] std::optional<Wire> accept(int milliseconds) const {
    pollfd ready{descriptor_, POLLIN, 0};
    if (::poll(&ready, 1, milliseconds) <= 0) {
      return std::nullopt;
    }
    const int accepted = ::accept4(descriptor_, nullptr, nullptr, SOCK_CLOEXEC);
    return accepted == -1 ? std::nullopt : std::optional<Wire>(std::in_place, accepted);
  }

 private:
  int descriptor_ = -1;
  std::uint16_t port_ = 0;
};

}  // namespace kvferry::fuzz
