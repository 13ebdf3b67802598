// SPDX-License-Identifier: Apache-2.0
// Loads a plugin that has kvferry in it, uses and unloads it, several times, and once while a name is still being looked up:
// plugin_host PLUGIN.
#include <dlfcn.h>
#include <netdb.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <system_error>
#include <thread>

namespace {

std::atomic<bool> asked{false};
std::atomic<bool> may_answer{false};

std::size_t threads() {
  const std::filesystem::directory_iterator all("/proc/self/task");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

/// @return whether it came true within a minute.
template <class Condition>
bool wait_until(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!condition() && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  return condition();
}

class Plugin {
 public:
  explicit Plugin(const char* path) : handle_(::dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) {
      std::fprintf(stderr, "%s\n", ::dlerror());
    }
  }
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;
  ~Plugin() {
    if (handle_ != nullptr) {
      ::dlclose(handle_);
    }
  }
  explicit operator bool() const { return handle_ != nullptr; }
  template <class Function>
  Function* get(const char* name) const {
    return reinterpret_cast<Function*>(::dlsym(handle_, name));
  }

 private:
  void* handle_;
};

bool works(const char* path) {
  const Plugin plugin(path);
  if (!plugin || plugin.get<int()>("transfer")() != 0) {
    return false;
  }
  try {
    plugin.get<void()>("fail")();
  } catch (const std::system_error& error) {
    return error.code().message().size() > 0;
  }
  return false;
}

}  // namespace

/// Takes the C library's place in the whole process: one name takes its time.
extern "C" __attribute__((visibility("default"))) int getaddrinfo(const char* host, const char* service,
                                                                  const addrinfo* hints, addrinfo** result) {
  if (host != nullptr && std::strcmp(host, "slow.invalid") == 0) {
    asked = true;
    may_answer.wait(false);
    return EAI_NONAME;
  }
  const auto real = reinterpret_cast<int (*)(const char*, const char*, const addrinfo*, addrinfo**)>(
      ::dlsym(RTLD_NEXT, "getaddrinfo"));
  return real(host, service, hints, result);
}

int main(int argc, char** argv) {
  if (argc != 2) {
    return 2;
  }
  for (int round = 0; round < 5; ++round) {
    if (!works(argv[1])) {
      return 1;
    }
  }
  {
    const Plugin plugin(argv[1]);
    plugin.get<void(const char*, void (*)())>("look_up")("tcp://slow.invalid:1",
                                                         [] { (void)wait_until([] { return asked.load(); }); });
    if (!asked) {
      return 3;
    }
  }
  // The lookup's thread goes on where the plugin was.
  may_answer = true;
  may_answer.notify_all();
  return wait_until([] { return threads() == 1; }) && works(argv[1]) ? 0 : 4;
}
