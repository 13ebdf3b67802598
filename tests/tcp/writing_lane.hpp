// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <kvferry/tcp/lane.hpp>

#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// A connected socket; the other end is closed with it.
struct Connection {
  explicit Connection(asio::io_context& context) : near(context), far(context) {
    asio::ip::tcp::acceptor acceptor(context, {asio::ip::address_v4::loopback(), 0});
    near.connect(acceptor.local_endpoint());
    acceptor.accept(far);
  }
  asio::ip::tcp::socket near;
  asio::ip::tcp::socket far;
};

/// A lane that has 4 MiB to write to a peer who takes nothing: as much as fits the socket's buffer is sent.
struct WritingLane {
  WritingLane() {
    lane->run({});
    TransferRequest request;
    request.kind = TransferKind::write;
    request.objects.assign(indexes.size(), page);
    request.remote_indexes = indexes;
    operation =
        std::make_shared<kit::Operation>(std::move(request), Completion::direct([](std::error_code, std::size_t) {}),
                                         kit::Clock::now() + std::chrono::hours(1), registry);
    EXPECT_FALSE(registry->add(operation));
  }
  ~WritingLane() {
    lane->shut(errc::closed, "the test ends it");
    lane->disconnect();
    context.poll();
  }

  std::uint64_t sent_by_start() {
    lane->start(std::make_shared<StripedOperation>(operation, 1), {0, indexes.size()});
    return traffic->sent.load();
  }

  asio::io_context context;
  Connection connection{context};
  std::shared_ptr<kit::OperationRegistry> registry =
      std::make_shared<kit::OperationRegistry>(std::make_shared<kit::DeadlineQueue>(context.get_executor()), 16);
  std::shared_ptr<LaneTraffic> traffic = std::make_shared<LaneTraffic>();
  std::shared_ptr<Lane> lane = std::make_shared<Lane>(
      std::move(connection.near), std::make_shared<Host>(std::vector<MemoryRegion>{}),
      Lane::Options{std::chrono::seconds(1), std::make_shared<SocketEvents>(context.get_executor()), {}, traffic},
      std::weak_ptr<Lane::Owner>());
  std::vector<std::byte> page = std::vector<std::byte>(std::size_t{64} << 10);
  std::vector<std::uint64_t> indexes = std::vector<std::uint64_t>(64);
  std::shared_ptr<kit::Operation> operation;
};

}  // namespace kvferry::tcp::testing
