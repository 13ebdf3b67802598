// SPDX-License-Identifier: Apache-2.0
#define KVFERRY_HEADER_ONLY 1
// A header in the middle of the others comes first.
#include <kvferry/kit/link.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include <system_error>

std::error_code header_only_error() {
  const kvferry::TcpTransferChannel channel({});
  return make_error_code(kvferry::errc::closed);
}
