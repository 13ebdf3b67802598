// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/steady_timer.hpp>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <kvferry/kit/link.hpp>

#include <kvferry/tcp/address_race.hpp>
#include <kvferry/detail/name_lookups.hpp>
#include <kvferry/tcp/data_acceptor.hpp>
#include <kvferry/tcp/hello.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Makes the data connections for an `AcceptEndpoint`, and a link of them. All go to one address; if a name has
/// several, to the one that accepted the first connection.
class DataDialer : public std::enable_shared_from_this<DataDialer> {
 public:
  /// @param certificates null: the endpoint has a key, or connections aren't encrypted.
  DataDialer(const asio::any_io_executor& executor, LinkOptions options, std::shared_ptr<kit::LinkHost> host,
             AcceptEndpoint endpoint, std::shared_ptr<kit::NameLookups> lookups, kit::LinkHandler on_link,
             std::shared_ptr<const TlsCertificates> certificates = nullptr);

  void dial(kit::Clock::time_point deadline);
  /// Gives up; `on_link` gets `cause` if it hasn't been called.
  void fail(std::error_code cause, std::string why);

 private:
  struct LaneDial;

  void found(std::error_code ec, const std::vector<asio::ip::address>& addresses);
  void race_ended(std::error_code ec, asio::ip::tcp::socket socket);
  void connect(const std::shared_ptr<LaneDial>& lane, const asio::ip::tcp::endpoint& to);
  void greet(const std::shared_ptr<LaneDial>& lane);
  void begin(LaneDial& lane, std::error_code& ec);
  void send_hello(LaneDial& lane, std::error_code& ec) const;
  using Step = void (DataDialer::*)(const std::shared_ptr<LaneDial>&);
  void when_readable(const std::shared_ptr<LaneDial>& lane, Step next);
  void read_welcome(const std::shared_ptr<LaneDial>& lane);
  [[nodiscard]] static bool may_be_a_crowd(LaneDial& lane, std::error_code ec);
  [[nodiscard]] static bool was_told_to_come_again(const LaneDial& lane);
  void come_again(const std::shared_ptr<LaneDial>& lane);
  void finish();
  [[nodiscard]] std::string where() const;

  const asio::any_io_executor executor_;
  const LinkOptions options_;
  const std::shared_ptr<kit::LinkHost> host_;
  const AcceptEndpoint endpoint_;
  const std::shared_ptr<const TlsCertificates> certificates_;  ///< That the peer was told of.
  const std::shared_ptr<kit::NameLookups> lookups_;
  std::mutex mutex_;  ///< Guards all below, the state of the sockets included.
  kit::LinkHandler on_link_;
  asio::steady_timer timer_;
  std::shared_ptr<AddressRace> race_;
  std::vector<std::shared_ptr<LaneDial>> lanes_;
  std::size_t welcomed_ = 0;
};

}  // namespace kvferry::tcp
