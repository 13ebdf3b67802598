// SPDX-License-Identifier: Apache-2.0
// A url that can be parsed is written as one that parses to the same, and nothing else is accepted in silence.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <system_error>

#include <kvferry/url.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::error_code ec;
  const auto parsed = kvferry::parse_url(text, ec);
  if (ec) {
    return 0;
  }
  (void)parsed.is_wildcard();
  if (kvferry::parse_url(parsed.to_url()) != parsed || kvferry::parse_url(parsed.to_string()) != parsed) {
    std::abort();
  }
  return 0;
}
