// SPDX-License-Identifier: Apache-2.0
#include "common/scripted_names.hpp"

#include <dlfcn.h>
#include <netdb.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::test {
namespace {

struct Name {
  std::vector<std::vector<std::string>> answers;
  int failure = 0;
  bool held = false;
  std::size_t asked = 0;
};

struct Script {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, Name, std::less<>> names;
};

/// Never destroyed: a thread may be in a lookup while the program exits.
Script& script() {
  static Script& names = *std::make_unique<Script>().release();
  return names;
}

using GetAddrInfo = int (*)(const char*, const char*, const addrinfo*, addrinfo**);

GetAddrInfo next() {
  static const auto found = reinterpret_cast<GetAddrInfo>(::dlsym(RTLD_NEXT, "getaddrinfo"));
  return found;
}

int numbers(const std::vector<std::string>& addresses, const char* service, const addrinfo* hints, addrinfo** result) {
  addrinfo numeric = hints != nullptr ? *hints : addrinfo{};
  numeric.ai_flags = (numeric.ai_flags | AI_NUMERICHOST) & ~AI_ADDRCONFIG;
  *result = nullptr;
  for (const auto& address : addresses) {
    addrinfo* entry = nullptr;
    if (const int failed = next()(address.c_str(), service, &numeric, &entry); failed != 0) {
      return failed;
    }
    addrinfo** last = result;
    while (*last != nullptr) {
      last = &(*last)->ai_next;
    }
    *last = entry;
  }
  return 0;
}

}  // namespace

ScriptedNames::~ScriptedNames() {
  Script& all = script();
  const std::lock_guard lock(all.mutex);
  all.names.clear();
  all.changed.notify_all();
}

void ScriptedNames::answer(const std::string& name, std::vector<std::vector<std::string>> answers) {
  const std::lock_guard lock(script().mutex);
  script().names[name].answers = std::move(answers);
}

void ScriptedNames::fail(const std::string& name, int resolver_code) {
  const std::lock_guard lock(script().mutex);
  script().names[name].failure = resolver_code;
}

void ScriptedNames::hold(const std::string& name) {
  const std::lock_guard lock(script().mutex);
  script().names[name].held = true;
}

void ScriptedNames::release(const std::string& name) {
  const std::lock_guard lock(script().mutex);
  script().names[name].held = false;
  script().changed.notify_all();
}

std::size_t ScriptedNames::asked(const std::string& name) const {
  const std::lock_guard lock(script().mutex);
  return script().names[name].asked;
}

void ScriptedNames::wait_until_asked(const std::string& name, std::size_t count) const {
  std::unique_lock lock(script().mutex);
  script().changed.wait(lock, [&] { return script().names[name].asked >= count; });
}

namespace {

int scripted(const char* node, const char* service, const addrinfo* hints, addrinfo** result) {
  Script& all = script();
  std::vector<std::string> answer;
  {
    std::unique_lock lock(all.mutex);
    auto name = all.names.find(std::string_view(node != nullptr ? node : ""));
    if (name == all.names.end()) {
      lock.unlock();
      return next()(node, service, hints, result);
    }
    const std::size_t turn = name->second.asked++;
    all.changed.notify_all();
    all.changed.wait(lock, [&] {
      name = all.names.find(std::string_view(node));
      return name == all.names.end() || !name->second.held;
    });
    if (name == all.names.end() || name->second.failure != 0) {
      return name == all.names.end() ? EAI_NONAME : name->second.failure;
    }
    const auto& answers = name->second.answers;
    if (answers.empty()) {
      return EAI_NONAME;
    }
    answer = answers[std::min(turn, answers.size() - 1)];
  }
  return numbers(answer, service, hints, result);
}

}  // namespace
}  // namespace kvferry::test

extern "C" int getaddrinfo(const char* node, const char* service, const addrinfo* hints, addrinfo** result) {
  return kvferry::test::scripted(node, service, hints, result);
}
