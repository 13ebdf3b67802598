// SPDX-License-Identifier: Apache-2.0
#include "control.hpp"

#include <fmt/core.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <kvferry/url.hpp>

#include <asio/buffer.hpp>
#include <asio/connect.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read_until.hpp>
#include <asio/write.hpp>

#include <array>
#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace bench {
namespace {

using asio::ip::tcp;

[[noreturn]] void throw_errno(int error, const char* what) {
  throw std::system_error(error, std::system_category(), what);
}

std::unique_ptr<asio::io_context> make_context() { return std::make_unique<asio::io_context>(1); }

tcp::resolver::results_type resolve(asio::io_context& context, const std::string& address) {
  const auto url = kvferry::parse_url(address);
  return tcp::resolver(context).resolve(url.host, std::to_string(url.port));
}

}  // namespace

Control::Control(std::unique_ptr<asio::io_context> context, Socket socket)
    : context_(std::move(context)), socket_(std::move(socket)) {}

Control::Control(int socket) : context_(make_context()), socket_(*context_) {
  sockaddr_storage name{};
  socklen_t size = sizeof(name);
  if (::getsockname(socket, reinterpret_cast<sockaddr*>(&name), &size) != 0) {
    throw_errno(errno, "the control connection");
  }
  socket_.assign(asio::generic::stream_protocol(name.ss_family, 0), socket);
}

Control Control::accept(const std::string& address) {
  auto context = make_context();
  tcp::acceptor acceptor(*context, *resolve(*context, address).begin());
  const auto bound = acceptor.local_endpoint();
  fmt::print("listening on {}:{}\n", bound.address().to_string(), bound.port());
  std::fflush(stdout);
  auto socket = acceptor.accept();
  return Control(std::move(context), Socket(std::move(socket)));
}

Control Control::connect(const std::string& address) {
  auto context = make_context();
  tcp::socket socket(*context);
  asio::connect(socket, resolve(*context, address));
  return Control(std::move(context), Socket(std::move(socket)));
}

void Control::send(const Json& message) { asio::write(socket_, asio::buffer(message.dump() + '\n')); }

bool Control::ended() {
  if (!received_.empty()) {
    return false;
  }
  std::error_code ec;
  std::array<char, 4096> bytes{};
  const std::size_t count = socket_.read_some(asio::buffer(bytes), ec);
  received_.append(bytes.data(), count);
  return ec == asio::error::eof || ec == asio::error::connection_reset;
}

Json Control::receive() {
  std::error_code ec;
  const std::size_t size = asio::read_until(socket_, asio::dynamic_buffer(received_), '\n', ec);
  if (ec) {
    throw std::runtime_error(fmt::format("the other process is gone: {}", ec.message()));
  }
  auto message = Json::parse(received_.substr(0, size));
  received_.erase(0, size);
  if (message.contains("error")) {
    throw std::runtime_error("at the other process: " + message.at("error").get<std::string>());
  }
  return message;
}

Json Control::ask(const Json& message) {
  send(message);
  return receive();
}

TargetProcess::TargetProcess() {
  std::array<int, 2> sockets{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()) != 0) {
    throw_errno(errno, "socketpair");
  }
  control_ = std::make_unique<Control>(sockets[0]);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, sockets[1], STDIN_FILENO);
  std::string program = "/proc/self/exe";
  std::string option = target_option;
  const std::array<char*, 3> arguments{program.data(), option.data(), nullptr};
  const int error = ::posix_spawn(&pid_, program.c_str(), &actions, nullptr, arguments.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::close(sockets[1]);
  if (error != 0) {
    throw_errno(error, "the target process");
  }
}

TargetProcess::~TargetProcess() {
  if (pid_ > 0) {
    // Something failed: it may wait for what never comes.
    ::kill(pid_, SIGTERM);
    ::waitpid(pid_, nullptr, 0);
  }
}

void TargetProcess::finish() {
  control_.reset();
  int status = 0;
  if (::waitpid(std::exchange(pid_, -1), &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    throw std::runtime_error(fmt::format("the target process ended with status {}", status));
  }
}

}  // namespace bench
