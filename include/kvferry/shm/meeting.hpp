// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/steady_timer.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <kvferry/detail/process.hpp>
#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/refusals.hpp>
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/process_memory.hpp>
#include <kvferry/tcp/hello.hpp>
#include <kvferry/tcp/tcp_link.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The messages of both sides on a connection before the welcome, which is TCP's.
struct Greeting {
  static constexpr std::uint64_t dialing = 0x4f4c4c45484d4853;    // "SHMHELLO"
  static constexpr std::uint64_t accepting = 0x5245574e414d4853;  // "SHMANWER"
  static constexpr std::uint64_t settled = 0x444c5454534d4853;    // "SHMSTTLD"
  /// The same, from a side that has mapped the ring that came with the answer, and passes its own.
  static constexpr std::uint64_t settled_with_ring = 0x53474e49524d4853;  // "SHMRINGS"

  std::uint64_t magic = dialing;
  std::uint32_t version = 2;
  Reach reach;  ///< Whether the sender can read the receiver's memory; not known yet in the dialing side's first one.
  std::uint64_t incarnation = 0;  ///< The sender's.
  tcp::Secret secret{};
  std::uint64_t proof_address = 0;  ///< The address in the sender's memory of ...
  tcp::Secret proof{};              ///< ... these bytes, for the receiver to read.
};
static_assert(sizeof(Greeting) == 64);
static_assert(sizeof(tcp::Hello) == sizeof(Greeting));

/// The welcome's `reserved`: later bytes go through rings. A peer without support for rings leaves it 0.
inline constexpr std::uint32_t welcome_to_rings = 1;

/// The accepting side's endpoint, in the handshake's answer. The dialing side has none.
struct AcceptEndpoint {
  Bytes name;  ///< The name of an abstract socket that exists only for this attempt.
  Bytes dial_secret;
  Bytes accept_secret;

  static constexpr std::string_view side_message_type = "ShmAccept";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("name", &AcceptEndpoint::name),
                      side_message_field("dial_secret", &AcceptEndpoint::dial_secret),
                      side_message_field("accept_secret", &AcceptEndpoint::accept_secret));
  }
};

/// The parts that all meetings of a channel share.
struct MeetingOptions {
  std::uint64_t incarnation = 0;
  std::vector<std::uint32_t> allowed_users;  ///< Besides this process's own.
  bool process_memory = true;
  std::uint64_t process_memory_threshold = 0;
  tcp::TcpLink::Options link;
  std::shared_ptr<MemoryTraffic> memory_traffic;
  std::shared_ptr<kit::Logger> logger;
  std::shared_ptr<kit::Refusals> refusals;
};

/// An attempt of two processes to connect: from the handshake until there is a link. Each side shows a secret that the
/// handshake told it, and tries to read the other's memory:
///
///   dialing side -> hello: where its memory has a proof
///   accepting side -> answer: the same, and whether it could read the other's; with the file of its ring
///   dialing side -> settled: whether it could; with the file of its own, if it has mapped the other's
///   accepting side -> welcome (`tcp::Hello`), the link's first bytes: whether the next ones go through the rings
class Meeting final : public std::enable_shared_from_this<Meeting> {
 public:
  /// @param socket the dialing side's, connected; or the accepting side's, which listens.
  Meeting(asio::any_io_executor executor, std::shared_ptr<const MeetingOptions> options,
          std::shared_ptr<kit::LinkHost> host, Descriptor socket, bool listening, const AcceptEndpoint& secrets,
          kit::LinkHandler on_link);

  Meeting(const Meeting&) = delete;
  Meeting& operator=(const Meeting&) = delete;
  ~Meeting() {
    if (!origin_.was_forked()) {  // a child shares the sockets with its parent
      stop_listening();
    }
  }

  /// Calls the `LinkHandler` once, after this call.
  void begin(kit::Attempts<Meeting>& attempts, kit::Clock::time_point deadline);
  /// Ends it, if it hasn't.
  void fail(std::error_code cause, std::string why);

 private:
  /// A connection that hasn't shown the secret yet.
  struct Candidate {
    explicit Candidate(asio::posix::stream_descriptor connection) : socket(std::move(connection)) {}
    Candidate(const Candidate&) = delete;
    Candidate& operator=(const Candidate&) = delete;
    ~Candidate() {
      if (!origin.was_forked()) {
        close();
      }
    }
    /// Otherwise the waits for its bytes keep it.
    void close() noexcept;

    const ProcessOfOrigin origin;
    asio::posix::stream_descriptor socket;
    std::array<std::byte, sizeof(Greeting)> bytes{};
    std::size_t received = 0;
    PassedDescriptors passed;  ///< What came with the bytes.
  };
  enum class Awaited { hello, answer, settled, welcome };
  /// Work to be done without the mutex.
  enum class Next { wait, finish };

  void wait_for_connections();
  void stop_listening() noexcept;
  void accept_one();
  void wait_for_bytes(const std::shared_ptr<Candidate>& candidate);
  void read(const std::shared_ptr<Candidate>& candidate);
  [[nodiscard]] Next take(const std::shared_ptr<Candidate>& candidate);
  void take_hello(const std::shared_ptr<Candidate>& candidate, const Greeting& hello);
  void look_at_peer(int descriptor, const Greeting& greeting);
  void say(std::uint64_t magic, const Descriptor& passed = {});
  [[nodiscard]] Descriptor make_ring();
  void map_ring(PassedDescriptors& all_passed);
  [[nodiscard]] bool has_rings() const noexcept { return why_no_rings_.empty(); }
  void turn_away(std::error_code cause, const std::string& why);
  [[nodiscard]] bool is_allowed(std::uint32_t user) const;
  void check_user(int descriptor);
  void finish();
  [[nodiscard]] std::shared_ptr<tcp::TcpLink> make_link();
  [[nodiscard]] std::string path() const;
  void end(std::error_code cause, std::string why, std::unique_lock<std::mutex>& lock);
  [[nodiscard]] std::string who() const;

  const ProcessOfOrigin origin_;
  const asio::any_io_executor executor_;
  const std::shared_ptr<const MeetingOptions> options_;
  const std::shared_ptr<kit::LinkHost> host_;
  const bool dialing_;
  tcp::Secret own_secret_{};
  tcp::Secret peers_secret_{};

  std::mutex mutex_;  ///< Guards all below.
  asio::steady_timer timer_;
  asio::posix::stream_descriptor listening_;
  std::list<std::shared_ptr<Candidate>> candidates_;  ///< The oldest first; one, when the peer has been found.
  Awaited awaited_;
  kit::LinkHandler on_link_;  ///< Empty when it has ended.
  PeerProcess peer_;
  OpenMemory peers_memory_;
  std::shared_ptr<ProcessMemory> memory_;
  Reach reach_;  ///< Of this side.
  Reach peers_reach_;
  RingFile ring_;
  MappedFile peers_ring_;
  std::string why_no_rings_ = "not agreed on yet";  ///< For people; empty: there are both.
};

}  // namespace kvferry::shm
