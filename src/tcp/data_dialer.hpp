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

#include "data_acceptor.hpp"
#include "hello.hpp"

namespace kvferry::tcp {

/// Makes the data connections that an `AcceptEndpoint` asks for and a link of them.
class DataDialer : public std::enable_shared_from_this<DataDialer> {
 public:
  DataDialer(const asio::any_io_executor& executor, LinkOptions options, std::shared_ptr<kit::LinkHost> host,
             AcceptEndpoint endpoint, kit::LinkHandler on_link);

  void dial(kit::Clock::time_point deadline);
  /// Gives up; `on_link` gets `cause` if it hasn't been called.
  void fail(std::error_code cause, std::string why);

 private:
  struct LaneDial;

  void connect(const std::shared_ptr<LaneDial>& lane);
  void try_next(const std::shared_ptr<LaneDial>& lane, std::error_code cause);
  void send_hello(const std::shared_ptr<LaneDial>& lane);
  void wait_for_welcome(const std::shared_ptr<LaneDial>& lane);
  void read_welcome(const std::shared_ptr<LaneDial>& lane);
  void finish();
  [[nodiscard]] std::string where() const;

  const asio::any_io_executor executor_;
  const LinkOptions options_;
  const std::shared_ptr<kit::LinkHost> host_;
  const AcceptEndpoint endpoint_;
  std::mutex mutex_;  ///< Guards all below, the state of the sockets included.
  kit::LinkHandler on_link_;
  asio::ip::tcp::resolver resolver_;
  asio::steady_timer timer_;
  std::vector<asio::ip::tcp::endpoint> candidates_;
  std::vector<std::shared_ptr<LaneDial>> lanes_;
  std::size_t welcomed_ = 0;
};

}  // namespace kvferry::tcp
