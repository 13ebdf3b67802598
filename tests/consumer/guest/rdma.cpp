// SPDX-License-Identifier: Apache-2.0
// Links RDMA: a channel, or the word that this host has no device.
#include <cstdio>
#include <exception>
#include <system_error>

#include <kvferry/rdma_transfer_channel.hpp>

int main() {
  try {
    const kvferry::RdmaTransferChannel channel(kvferry::RdmaOptions{});
    std::puts("there is a device");
  } catch (const std::system_error& error) {
    std::puts(error.what());
    return error.code() == std::errc::no_such_device ? 0 : 1;
  }
  return 0;
}
