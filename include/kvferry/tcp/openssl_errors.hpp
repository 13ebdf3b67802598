// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/config.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/err.h>

#include <cerrno>
#include <new>
#include <string>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Each thread has its own list of OpenSSL's errors, and the thread may belong to a caller that uses OpenSSL as well.
/// During the lifetime of this object the list has only new errors; then its former contents are restored. A mark
/// (ERR_set_mark) isn't enough: a handshake and a change of keys empty the list.
class OpenSslErrors {
 public:
  OpenSslErrors() noexcept {
    if (ERR_peek_error() != 0) {
      set_aside();
    }
  }
  ~OpenSslErrors() {
    const int error = errno;
    if (ERR_peek_error() != 0) {
      ERR_clear_error();
    }
    for (const Error& kept : kept_) {
      ERR_new();
      ERR_set_debug(kept.file.c_str(), kept.line, kept.function.c_str());
      ERR_set_error(ERR_GET_LIB(kept.code), ERR_GET_REASON(kept.code), kept.text.empty() ? nullptr : "%s",
                    kept.text.c_str());
    }
    errno = error;
  }
  OpenSslErrors(const OpenSslErrors&) = delete;
  OpenSslErrors& operator=(const OpenSslErrors&) = delete;

  /// Whether one of what has happened is that memory is used up.
  [[nodiscard]] static bool out_of_memory() noexcept {
    return ERR_GET_REASON(ERR_peek_error()) == ERR_R_MALLOC_FAILURE ||
           ERR_GET_REASON(ERR_peek_last_error()) == ERR_R_MALLOC_FAILURE;
  }
  /// The last of it, in OpenSSL's words.
  [[nodiscard]] static std::string reason() {
    const char* const reason = ERR_reason_error_string(ERR_peek_last_error());
    return reason == nullptr ? "unknown error" : reason;
  }

 private:
  struct Error {
    unsigned long code = 0;
    int line = 0;
    std::string file;
    std::string function;
    std::string text;
  };

  void set_aside() noexcept {
    try {
      Error error;
      const char* file = nullptr;
      const char* function = nullptr;
      const char* text = nullptr;
      int flags = 0;
      while ((error.code = ERR_get_error_all(&file, &error.line, &function, &text, &flags)) != 0) {
        error.file = file;
        error.function = function;
        error.text = (flags & ERR_TXT_STRING) != 0 ? text : "";
        kept_.push_back(error);
      }
    } catch (const std::bad_alloc&) {
      ERR_clear_error();  // lost, as it might have been to whoever reports it
    }
  }

  std::vector<Error> kept_;
};

}  // namespace kvferry::tcp

#endif
