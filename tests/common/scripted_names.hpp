// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

/// What a test has host names resolve to, in the program that scripted_names.cpp is part of: its `getaddrinfo` comes before the
/// C library's. Names that no script knows go to that one.
///
/// Thread safety: all functions may be called from any thread.
class ScriptedNames {
 public:
  ScriptedNames() = default;
  ScriptedNames(const ScriptedNames&) = delete;
  ScriptedNames& operator=(const ScriptedNames&) = delete;
  /// Releases the names that are held, and forgets all.
  ~ScriptedNames();

  /// @param answers one for each lookup, the last one for all later ones too. An empty one is a list without an entry.
  void answer(const std::string& name, std::vector<std::vector<std::string>> answers);
  /// The resolver's failure (`EAI_...`).
  void fail(const std::string& name, int resolver_code);
  /// Lookups of this name don't return until it is released.
  void hold(const std::string& name);
  void release(const std::string& name);

  /// How often a name was looked up.
  [[nodiscard]] std::size_t asked(const std::string& name) const;
  /// Waits until `count` lookups of a name have begun.
  void wait_until_asked(const std::string& name, std::size_t count = 1) const;
};

}  // namespace kvferry::test
