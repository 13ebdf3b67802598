// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/tcp/hello.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// A stranger's question to "b", whose data connections it may then make.
inline kit::InitQuestion question() {
  kit::InitQuestion made;
  made.transport = "tcp";
  made.sender_id = "stranger";
  made.receiver_id = "b";
  made.incarnation = 4711;
  made.endpoint = encode_side_message(DialEndpoint{1}).encoded();
  return made;
}

}  // namespace kvferry::tcp::testing
