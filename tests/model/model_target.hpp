// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/channel_options.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/pausable_executor.hpp>

namespace kvferry::inline KVFERRY_ABI::model {

using Word = std::uint64_t;

/// Pages that several processes may see; named by a descriptor that is inherited.
class SharedPages {
 public:
  SharedPages(int descriptor, std::size_t bytes)
      : bytes_(bytes),
        data_(static_cast<std::byte*>(
            ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0))) {
    if (data_ == MAP_FAILED) {
      throw std::system_error(errno, std::generic_category(), "mmap");
    }
  }
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;
  ~SharedPages() { ::munmap(data_, bytes_); }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  const std::size_t bytes_;
  std::byte* const data_;
};

struct TargetShape {
  std::size_t lanes = 1;
  std::size_t page_bytes = 4096;
  std::size_t pages = 64;
};

/// @name The transport that a program is about: tcp_model.cpp, rdma_model.cpp
/// @{
/// Lanes or rails, at most.
[[nodiscard]] std::size_t most_lanes();
/// In which what is done at once on an idle machine is done.
[[nodiscard]] std::chrono::seconds patience();
[[nodiscard]] std::unique_ptr<BaseTransferChannel> make_target_channel(const TargetShape& shape,
                                                                       ChannelOptions options);
[[nodiscard]] std::unique_ptr<BaseTransferChannel> make_source_channel(const TargetShape& shape,
                                                                       ChannelOptions options);
/// @}

/// The side that owns the pages, and that can be held up, fenced and restarted.
class Target {
 public:
  virtual ~Target() = default;
  [[nodiscard]] virtual std::string url() = 0;
  virtual void pause() = 0;
  virtual void resume() = 0;
  virtual void fence(const std::string& peer) = 0;
  virtual void restart() = 0;
};

/// The channel of a target, in the process that calls.
class TargetChannel final : public Target {
 public:
  TargetChannel(const TargetShape& shape, const SharedPages& pages, std::string url = kvferry::testing::own_loopback_url())
      : shape_(shape), pages_(pages), url_(std::move(url)) {
    open();
  }

  [[nodiscard]] std::string url() override { return channel_->peer_init_url(); }
  void pause() override { executor_->pause(std::chrono::seconds(30)); }
  void resume() override { executor_->resume(); }
  void fence(const std::string& peer) override { channel_->fence(peer, std::chrono::milliseconds(200)); }
  void restart() override {
    url_ = url();
    channel_.reset();
    open();
  }

 private:
  void open() {
    ChannelOptions options;
    options.executor = executor_->executor();
    options.peer_init_url = url_;
    options.regions = {{pages_.data(), shape_.pages * shape_.page_bytes, shape_.page_bytes, Access::read_write}};
    channel_ = make_target_channel(shape_, std::move(options));
  }

  const TargetShape shape_;
  const SharedPages& pages_;
  std::string url_;
  const std::unique_ptr<testing::PausableExecutor> executor_ = std::make_unique<testing::PausableExecutor>();
  std::unique_ptr<BaseTransferChannel> channel_;
};

}  // namespace kvferry::model
