// SPDX-License-Identifier: Apache-2.0
#include "hostile/attacks.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/tcp/frame.hpp>
#include <kvferry/tcp/hello.hpp>
#include "common/zmtp.hpp"

namespace kvferry::inline KVFERRY_ABI::hostile {
namespace {

/// Descriptors that an attacker holds at a time.
constexpr std::size_t sockets_held = 700;

class Dealer {
 public:
  explicit Dealer(const Target& target) : socket_(context_, zmq::socket_type::dealer) {
    socket_.set(zmq::sockopt::linger, 0);
    socket_.set(zmq::sockopt::reconnect_ivl, 1);
    socket_.connect(target.init_url());
  }

  void send(std::span<const std::byte> frame, bool more = false) {
    socket_.send(zmq::buffer(frame.data(), frame.size()), more ? zmq::send_flags::sndmore : zmq::send_flags::none);
  }
  void send_request(const SideMessage& request) {
    send({}, true);
    send(request.encoded());
  }
  void forget_answers() {
    zmq::message_t ignored;
    while (socket_.recv(ignored, zmq::recv_flags::dontwait)) {
    }
  }

 private:
  zmq::context_t context_;
  zmq::socket_t socket_;
};

SideMessage init_question(const std::string& id) {
  static std::uint64_t incarnation = 1;
  kit::InitQuestion question;
  question.transport = "tcp";
  question.sender_id = id;
  question.receiver_id = "hub";
  question.incarnation = ++incarnation;
  question.regions = {{4096, 4096, 3}};
  Bytes endpoint;
  question.endpoint = encode_side_message(tcp::DialEndpoint{1}).encoded();
  return encode_side_message(question);
}

SideMessage message_of_type(std::size_t size) {
  std::string header("\x81\xa4type\xda", 7);
  header += static_cast<char>(size >> 8);
  header += static_cast<char>(size & 0xFF);
  header += std::string(size, 'T');
  const auto bytes = std::as_bytes(std::span(header));
  return parse_side_message(bytes);
}

void init_requests(const Target& target) {
  Dealer dealer(target);
  for (std::uint64_t i = 0;; ++i) {
    dealer.send_request(init_question("stranger-" + std::to_string(i)));
    dealer.forget_answers();
  }
}

void init_requests_of_one_id(const Target& target) {
  Dealer dealer(target);
  for (;;) {
    dealer.send_request(init_question("stranger"));
    dealer.forget_answers();
  }
}

void oversized(const Target& target) {
  Dealer dealer(target);
  const std::vector<std::byte> large(std::size_t{1} << 20, std::byte{0xC0});
  for (;;) {
    dealer.send({}, true);
    dealer.send(large);
  }
}

void many_values(const Target& target) {
  Dealer dealer(target);
  // A map with one field that nobody knows: an array of 60,000 nils.
  std::vector<std::byte> frame;
  for (const char byte : std::string("\x82\xA4type\xA1x\xA1y\xDC\xEA\x60", 13)) {
    frame.push_back(static_cast<std::byte>(byte));
  }
  frame.resize(frame.size() + 60'000, std::byte{0xC0});
  for (;;) {
    dealer.send({}, true);
    dealer.send(frame);
    dealer.forget_answers();
  }
}

void unfinished_parts(const Target& target) {
  Dealer dealer(target);
  const std::vector<std::byte> part(std::size_t{64} << 10);
  for (;;) {
    dealer.send(part, true);
  }
}

void empty_parts(const Target& target) {
  Dealer dealer(target);
  for (;;) {
    dealer.send({}, true);
  }
}

void answers_unread(const Target& target) {
  std::vector<int> sockets;
  const SideMessage request = message_of_type(60'000);
  // A socket of ZeroMQ's would read.
  std::string requests;
  for (int i = 0; i < 4; ++i) {
    requests += test::zmtp_request(request.encoded());
  }
  for (;;) {
    std::vector<int> held;
    for (int i = 0; i < 64; ++i) {
      const int socket = connect_to(target, target.init_port);
      held.push_back(socket);
      (void)test::zmtp_greet(socket);
      for (int n = 0; n < 16; ++n) {
        (void)::send(socket, requests.data(), requests.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      }
    }
    for (const int socket : held) {
      ::close(socket);
    }
  }
}

void half_open(const Target& target) { hold_connections(target, target.init_port, {}); }

void no_zeromq(const Target& target) {
  hold_connections(target, target.init_port, "GET / HTTP/1.1\r\nHost: hub\r\n\r\n");
}

void lying_hello(const Target& target) {
  tcp::Hello hello;
  hello.lane_count = 1;
  hello.incarnation = 4711;
  hold_connections(target, target.data_port, {reinterpret_cast<const char*>(&hello), sizeof(hello)});
}

void side_messages(const Target& target) {
  Dealer dealer(target);
  const SideMessage message = encode_side_message(P2PInitSideMsg{});
  for (;;) {
    dealer.send_request(message);
    dealer.forget_answers();
  }
}

void notifications(const Target& target) {
  std::vector<std::byte> memory(4096);
  TcpTransferChannel channel(TcpOptions{});
  const std::string url = target.init_url();
  const std::vector<std::byte> large(std::size_t{60} << 10);
  const std::vector<std::uint64_t> last_page{63};
  for (;;) {
    std::error_code ec;
    channel.lazy_init_peer_connection("notifier", "hub", url, {}, {}, ec);
    channel.batched_write({ConstBuffer(memory.data(), memory.size())},
                          {.peer_id = "hub", .remote_indexes = last_page, .notification = large}, ec);
  }
}

/// Pads what a stranger calls himself.
void long_ids(const Target& target) {
  Dealer dealer(target);
  for (std::uint64_t i = 0;; ++i) {
    dealer.send_request(init_question(std::string(48'000, 'x') + std::to_string(i)));
    dealer.forget_answers();
  }
}

/// A whole handshake, and a connection that is as good as a peer's. @return -1 if it came to nothing.
int link_as(zmq::context_t& context, const Target& target, const std::string& id) {
  zmq::socket_t socket(context, zmq::socket_type::req);
  socket.set(zmq::sockopt::linger, 0);
  socket.set(zmq::sockopt::rcvtimeo, 5'000);
  socket.connect(target.init_url());
  const SideMessage question = init_question(id);
  socket.send(zmq::buffer(question.encoded().data(), question.encoded().size()));
  zmq::message_t frame;
  if (!socket.recv(frame)) {
    return -1;
  }
  std::error_code ec;
  const auto answer = parse_side_message(std::span(static_cast<const std::byte*>(frame.data()), frame.size()), ec);
  if (ec || !answer.is<kit::InitAnswer>()) {
    return -1;
  }
  const auto accepted = decode_side_message<kit::InitAnswer>(answer);
  const auto endpoint = parse_side_message(accepted.endpoint, ec);
  if (ec) {
    return -1;
  }
  tcp::Hello hello;
  hello.lane_count = 1;
  hello.incarnation = decode_side_message<kit::InitQuestion>(question).incarnation;
  const auto secret = decode_side_message<tcp::AcceptEndpoint>(endpoint).dial_secret;
  std::ranges::copy(secret, hello.secret.begin());
  const int data = connect_to(target, target.data_port);
  tcp::Hello welcome;
  if (::send(data, &hello, sizeof(hello), MSG_NOSIGNAL) != ssize_t{sizeof(hello)} ||
      ::recv(data, &welcome, sizeof(welcome), MSG_WAITALL) != ssize_t{sizeof(welcome)}) {
    ::close(data);
    return -1;
  }
  return data;
}

/// Becomes many peers, which say something once and then nothing, and begins anew when it has many connections.
void become_peers(const Target& target, std::span<const std::byte> says) {
  constexpr std::size_t links_held = 200;
  zmq::context_t context;
  std::deque<int> held;
  for (std::uint64_t i = 0;; ++i) {
    const int link = link_as(context, target, "stranger-" + std::to_string(i));
    if (link == -1) {
      continue;
    }
    for (std::size_t sent = 0; sent < says.size();) {
      const ssize_t part = ::send(link, says.data() + sent, says.size() - sent, MSG_NOSIGNAL);
      if (part <= 0) {
        break;
      }
      sent += static_cast<std::size_t>(part);
    }
    held.push_back(link);
    if (held.size() == links_held) {
      ::close(held.front());
      held.pop_front();
    }
  }
}

void idle_peers(const Target& target) { become_peers(target, {}); }

tcp::FrameHeader recv_post(std::uint32_t buffers) {
  tcp::FrameHeader header;
  header.type = tcp::FrameType::recv_post;
  header.operation = 1;
  header.tag = 7;
  header.count = buffers;
  return header;
}

void half_a_frame(const Target& target) {
  const tcp::FrameHeader header = recv_post(1);
  become_peers(target, std::as_bytes(std::span(&header, 1)));
}

void half_a_recv(const Target& target) {
  std::vector<std::byte> bytes(sizeof(tcp::FrameHeader) + (std::size_t{1} << 20) * sizeof(tcp::Descriptor) - 1);
  const tcp::FrameHeader header = recv_post(std::uint32_t{1} << 20);
  std::memcpy(bytes.data(), &header, sizeof(header));
  become_peers(target, bytes);
}

void recvs(const Target& target) {
  zmq::context_t context;
  const int link = link_as(context, target, "receiver");
  std::vector<std::byte> bytes;
  for (std::uint64_t next = 1;;) {
    bytes.clear();
    for (int i = 0; i < 256; ++i) {
      tcp::FrameHeader header = recv_post(1);
      header.operation = next++;
      const tcp::Descriptor buffer{0, 4096};
      const auto append = [&](std::span<const std::byte> part) { bytes.insert(bytes.end(), part.begin(), part.end()); };
      append(std::as_bytes(std::span(&header, 1)));
      append(std::as_bytes(std::span(&buffer, 1)));
    }
    (void)::send(link, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    std::array<std::byte, 1 << 16> answers;
    while (::recv(link, answers.data(), answers.size(), MSG_DONTWAIT) > 0) {
    }
  }
}

void tiny_notifications(const Target& target) {
  TcpTransferChannel channel(TcpOptions{});
  const std::string url = target.init_url();
  const std::vector<std::byte> memory(1);
  const std::vector<std::byte> note(1);
  const std::vector<std::uint64_t> last_page{63};
  for (;;) {
    std::error_code ec;
    channel.lazy_init_peer_connection("notifier", "hub", url, {}, {}, ec);
    channel.batched_write({ConstBuffer(memory.data(), memory.size())},
                          {.peer_id = "hub", .remote_indexes = last_page, .notification = note}, ec);
  }
}

/// As `hold_connections`, with a byte at a time.
void slow_bytes(const Target& target) {
  const std::string says = test::zmtp_hello();
  constexpr std::size_t connections = 300;
  std::vector<std::pair<int, std::size_t>> held;
  for (std::size_t next = 0;; ++next) {
    if (held.size() < connections) {
      held.emplace_back(connect_to(target, target.init_port), 0);
    }
    auto& [socket, said] = held[next % held.size()];
    if (::send(socket, &says[said % says.size()], 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) {
      ::close(socket);
      socket = connect_to(target, target.init_port);
      said = 0;
      continue;
    }
    ++said;
    ::usleep(500);
  }
}

constexpr std::array all{
    NamedAttack{"InitRequests", "init requests, each under a new id", init_requests, Secured::by_nothing,
                "newer handshakes have taken the place"},
    NamedAttack{"InitRequestsOfOneId", "init requests under one id", init_requests_of_one_id},
    NamedAttack{"LongIds", "init requests with ids of 48 KB", long_ids, Secured::by_nothing, "bytes, at most 256"},
    NamedAttack{"Oversized", "messages of 1 MiB", oversized},
    NamedAttack{"ManyValues", "messages of 60,000 values that nobody asked for", many_values, Secured::by_nothing,
                "it has too many values"},
    NamedAttack{"UnfinishedParts", "a message of 64 KiB parts without end", unfinished_parts},
    NamedAttack{"EmptyParts", "a message of empty parts without end", empty_parts},
    NamedAttack{"AnswersUnread", "requests whose answers nobody reads", answers_unread},
    NamedAttack{"HalfOpen", "700 connections to the handshake's port that say nothing", half_open},
    NamedAttack{"HalfAGreeting", "700 that stop within ZeroMQ's greeting", half_a_greeting},
    NamedAttack{"IdleHandshakes", "700 that say nothing after ZeroMQ's greeting", idle_handshakes},
    NamedAttack{"SlowBytes", "300 that say a byte at a time", slow_bytes},
    NamedAttack{"NoZeroMq", "700 that speak HTTP", no_zeromq, Secured::by_nothing, "is no ZeroMQ greeting"},
    NamedAttack{"NoHello", "700 connections to the data port that stop within their hello", no_hello,
                Secured::by_nothing, "had to make room for a newer one"},
    NamedAttack{"LyingHello", "700 with a hello that nobody expects", lying_hello, Secured::by_nothing,
                "belongs to no handshake"},
    NamedAttack{"SideMessages", "side messages for a slow handler", side_messages, Secured::by_nothing,
                "too many messages wait here"},
    NamedAttack{
        "Notifications", "notifications of 60 KiB that nobody takes", notifications, Secured::by_nothing, {}, true},
    NamedAttack{"TinyNotifications",
                "notifications of one byte that nobody takes",
                tiny_notifications,
                Secured::by_nothing,
                {},
                true},
    NamedAttack{
        "IdlePeers", "200 strangers that become peers and then say nothing", idle_peers, Secured::by_nothing, {}, true},
    NamedAttack{
        "HalfAFrame", "200 that become peers and stop within a frame", half_a_frame, Secured::by_nothing, {}, true},
    NamedAttack{"HalfARecv",
                "200 that become peers and stop within a recv of 2^20 buffers",
                half_a_recv,
                Secured::by_nothing,
                {},
                true},
    NamedAttack{"Recvs", "recvs without end that nobody meets", recvs, Secured::by_nothing, {}, true},
};

}  // namespace

int connect_to(const Target& target, std::uint16_t port) {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  (void)::inet_pton(AF_INET, target.host.data(), &address.sin_addr);
  if (::connect(socket, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 && errno == ECONNREFUSED) {
    ::_exit(1);
  }
  return socket;
}

void hold_connections(const Target& target, std::uint16_t port, std::string_view says) {
  std::deque<int> held;
  for (;;) {
    held.push_back(connect_to(target, port));
    (void)::send(held.back(), says.data(), says.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (held.size() == sockets_held) {
      ::close(held.front());
      held.pop_front();
    }
  }
}

void half_a_greeting(const Target& target) {
  hold_connections(target, target.init_port, std::string_view("\xFF\0\0\0\0\0\0\0\1\x7F\3", 11));
}
void idle_handshakes(const Target& target) { hold_connections(target, target.init_port, test::zmtp_hello()); }
void no_hello(const Target& target) { hold_connections(target, target.data_port, "KVFHELLO"); }

std::span<const NamedAttack> attacks() { return all; }

}  // namespace kvferry::hostile
