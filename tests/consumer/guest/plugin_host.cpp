// SPDX-License-Identifier: Apache-2.0
// Loads a plugin that has kvferry in it, uses and unloads it, several times: plugin_host PLUGIN.
#include <dlfcn.h>

#include <cstdio>
#include <system_error>

int main(int argc, char** argv) {
  if (argc != 2) {
    return 2;
  }
  for (int round = 0; round < 5; ++round) {
    void* const plugin = ::dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (plugin == nullptr) {
      std::fprintf(stderr, "%s\n", ::dlerror());
      return 2;
    }
    const auto transfer = reinterpret_cast<int (*)()>(::dlsym(plugin, "transfer"));
    const auto fail = reinterpret_cast<void (*)()>(::dlsym(plugin, "fail"));
    if (transfer() != 0) {
      return 1;
    }
    bool caught = false;
    try {
      fail();
    } catch (const std::system_error& error) {
      caught = error.code().message().size() > 0;
    }
    if (!caught) {
      return 1;
    }
    ::dlclose(plugin);
  }
  return 0;
}
