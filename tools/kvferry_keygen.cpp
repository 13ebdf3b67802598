// SPDX-License-Identifier: Apache-2.0
// Makes the keys of `kvferry::Keyring`: the secret one in a file that nobody else may read, the public one on the standard
// output, as a line of the file that peers read.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>
#include <system_error>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>

namespace {

constexpr const char* usage =
    "usage: kvferry-keygen FILE ID           make a key pair: the secret key in FILE, which must not exist\n"
    "       kvferry-keygen --public FILE ID  of a key pair that there is\n"
    "       kvferry-keygen --help            this text\n"
    "\n"
    "Prints a line for the file that peers read (kvferry::read_peer_keys): the public key and ID, the peer id that "
    "its\n"
    "owner may have, \"*\" for any.\n";

[[noreturn]] void refuse(const std::string& path) {
  throw kvferry::TransferError(std::error_code(errno, std::system_category()), path);
}

void write_secret(const std::string& path, const kvferry::SecretKey& key) {
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) {
    refuse(path);
  }
  // Neither the folder's default access list nor the mask has a say.
  bool written = ::fchmod(file, 0600) == 0;
  for (const std::string_view part : {std::string_view(key.text()), std::string_view("\n")}) {
    written = written && ::write(file, part.data(), part.size()) == static_cast<ssize_t>(part.size());
  }
  written = written && ::fsync(file) == 0;
  const int error = errno;
  if (::close(file) != 0 || !written) {
    errno = written ? errno : error;
    ::unlink(path.c_str());
    refuse(path);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && (std::string_view(arguments[1]) == "--help" || std::string_view(arguments[1]) == "-h")) {
    std::cout << usage << std::flush;
    return std::cout ? 0 : 1;
  }
  const bool exists = count == 4 && std::string_view(arguments[1]) == "--public";
  const bool is_option = count > 1 && std::string_view(arguments[1]).starts_with("--");
  const bool is_one_line =
      count > 2 && std::string_view(arguments[count - 1]).find_first_of("\r\n") == std::string_view::npos;
  if ((count != 3 || is_option || !is_one_line) && !(exists && is_one_line)) {
    std::cerr << usage;
    return 2;
  }
  const std::string path = arguments[count - 2];
  try {
    kvferry::KeyPair pair;
    if (exists) {
      pair = kvferry::read_key_pair(path);
    } else {
      pair = kvferry::make_key_pair();
      write_secret(path, pair.secret_key);
    }
    std::cout << pair.public_key << ' ' << arguments[count - 1] << std::endl;
    return std::cout ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "kvferry-keygen: " << error.what() << '\n';
    return 1;
  }
}
