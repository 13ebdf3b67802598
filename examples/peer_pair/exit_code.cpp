// SPDX-License-Identifier: Apache-2.0
#include "exit_code.hpp"

#include <fmt/core.h>
#include <kvferry/error.hpp>

#include <cstdio>
#include <exception>
#include <new>

namespace example {

int run_program(std::string_view name, const std::function<void()>& body) {
  const auto end_with = [name](ExitCode code, std::string_view line) {
    std::fflush(stdout);
    fmt::print(stderr, "{}: {}\n", name, line);
    return static_cast<int>(code);
  };
  try {
    body();
    return static_cast<int>(ExitCode::ok);
  } catch (const Failure& failure) {
    return end_with(failure.code(), failure.what());
  } catch (const kvferry::TransferError& error) {
    return end_with(ExitCode::transfer_failed, error.what());
  } catch (const std::bad_alloc&) {
    return end_with(ExitCode::no_file_or_memory, "out of memory");
  } catch (const std::exception& error) {
    return end_with(ExitCode::unexpected, error.what());
  }
}

}  // namespace example
