// SPDX-License-Identifier: Apache-2.0
// Keys: where they come from, who may see them, and whose they are.
#include <kvferry/keyring.hpp>

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

class KeyFile : public ::testing::Test {
 protected:
  KeyFile() { std::filesystem::create_directory(folder_); }
  ~KeyFile() override { std::filesystem::remove_all(folder_); }

  void write(const std::string& text, mode_t mode = 0600) const {
    std::filesystem::remove(path_);
    std::ofstream(path_) << text;
    ASSERT_EQ(::chmod(path_.c_str(), mode), 0);
  }

  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("kvferry_keys_" + std::to_string(::getpid()));
  const std::string path_ = folder_ / "key";
};

template <class Function>
TransferError error_of(Function function) {
  try {
    (void)function();
  } catch (const TransferError& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return {std::error_code(), ""};
}

TEST_F(KeyFile, IsReadIfNobodyElseCan) {
  const KeyPair made = make_key_pair();
  for (const mode_t mode : {0600U, 0400U}) {
    write(std::string(made.secret_key.text()) + "\n", mode);
    const KeyPair read = read_key_pair(path_);
    EXPECT_EQ(read.public_key, made.public_key);
    EXPECT_STREQ(read.secret_key.text(), made.secret_key.text());
  }
  for (const mode_t mode : {0640U, 0604U, 0660U, 0777U}) {
    write(made.secret_key.text(), mode);
    const auto error = error_of([&] { return read_key_pair(path_); });
    EXPECT_EQ(error.code(), std::errc::permission_denied);
    EXPECT_NE(std::string(error.what()).find(path_ + " has mode 0" + (mode == 0640U ? "640" : "")), std::string::npos)
        << error.what();
    EXPECT_NE(std::string(error.what()).find("0600"), std::string::npos) << error.what();
  }
}

TEST_F(KeyFile, OfAnotherUserIsRefused) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root gives files away";
  }
  write(make_key_pair().secret_key.text());
  ASSERT_EQ(::chown(path_.c_str(), 12345, 12345), 0);
  const auto error = error_of([&] { return read_key_pair(path_); });
  EXPECT_EQ(error.code(), std::errc::permission_denied);
  EXPECT_NE(std::string(error.what()).find("12345"), std::string::npos) << error.what();
}

TEST_F(KeyFile, ThatIsNoneIsRefusedWithoutRepeatingIt) {
  write("not a key, but perhaps somebody's password");
  const auto error = error_of([&] { return read_key_pair(path_); });
  EXPECT_EQ(error.code(), std::errc::invalid_argument);
  EXPECT_NE(std::string(error.what()).find(path_), std::string::npos) << error.what();
  EXPECT_EQ(std::string(error.what()).find("password"), std::string::npos) << error.what();
  std::filesystem::remove(path_);
  EXPECT_EQ(error_of([&] { return read_key_pair(path_); }).code(), std::errc::no_such_file_or_directory);
}

TEST_F(KeyFile, MayEndItsLinesAsWindowsDoesAndBeginWithAByteOrderMark) {
  const KeyPair made = make_key_pair();
  const std::string secret = made.secret_key.text();
  for (const std::string& text : {secret, secret + "\r\n", "\xef\xbb\xbf" + secret + "\n"}) {
    write(text);
    EXPECT_EQ(read_key_pair(path_).public_key, made.public_key);
  }
  write("\xef\xbb\xbf# keys\r\n\r\n" + made.public_key + " decode-3\r\n" + made.public_key + " prefill-1");
  const auto keys = read_peer_keys(path_);
  ASSERT_EQ(keys.size(), 2U);
  EXPECT_EQ(keys[0].peer_id, "decode-3");
  EXPECT_EQ(keys[1].peer_id, "prefill-1");
}

TEST_F(KeyFile, ThatComesThroughAPipeMayComeInParts) {
  const KeyPair made = make_key_pair();
  const std::string text = std::string(made.secret_key.text()) + "\n";
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  auto read = std::async(std::launch::async, [&] { return read_key_pair(path_); });
  const int pipe = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);  // so that there is a reader in any case
  ASSERT_GE(pipe, 0);
  ASSERT_EQ(::write(pipe, text.data(), 20), 20);
  // The other end has taken the first part when the pipe is empty.
  for (int left = 1; left != 0;) {
    ASSERT_EQ(::ioctl(pipe, FIONREAD, &left), 0);
    std::this_thread::yield();
  }
  ASSERT_EQ(::write(pipe, text.data() + 20, text.size() - 20), static_cast<ssize_t>(text.size() - 20));
  EXPECT_EQ(read.get().public_key, made.public_key);
  ::close(pipe);
}

TEST_F(KeyFile, OfPeersThatCannotBeReadIsAnErrorAndNotAnEmptyOne) {
  const auto error = error_of([&] { return read_peer_keys(folder_); });
  EXPECT_EQ(error.code(), std::errc::is_a_directory);
  EXPECT_NE(std::string(error.what()).find(folder_), std::string::npos) << error.what();
}

TEST_F(KeyFile, OfPeersHasNoIdsThatNoChannelCanHave) {
  const std::string key = make_key_pair().public_key;
  for (const std::string& id : {std::string("a\tb"), std::string("a\rb"), std::string("\xff"), std::string(257, 'x')}) {
    write("#\n" + key + " " + id + "\n");
    const auto error = error_of([&] { return read_peer_keys(path_); });
    EXPECT_EQ(error.code(), std::errc::invalid_argument) << id;
    EXPECT_NE(std::string(error.what()).find("line 2"), std::string::npos) << error.what();
    EXPECT_EQ(error_of([&] { return Keyring(make_key_pair(), {{id, key}}).revision(); }).code(), errc::invalid_peer_id);
  }
}

TEST_F(KeyFile, OfPeersNamesKeyAndIdInEachLine) {
  const std::string a = make_key_pair().public_key;
  const std::string b = make_key_pair().public_key;
  write("# those who may come\n\n" + a + " decode-3\n" + b + " an id with spaces\n", 0644);
  const auto keys = read_peer_keys(path_);
  ASSERT_EQ(keys.size(), 2U);
  EXPECT_EQ(keys[0].peer_id, "decode-3");
  EXPECT_EQ(keys[0].public_key, a);
  EXPECT_EQ(keys[1].peer_id, "an id with spaces");
  const std::string key(40, 'k');
  const std::string key_like_a_comment = "#" + std::string(39, 'k');
  for (const std::string& line : {key, key + " ", key.substr(1) + " id", key + "k id", "decode-3 " + key,
                                  key_like_a_comment, key_like_a_comment + " "}) {
    write("#\n" + line + "\n");
    const auto error = error_of([&] { return read_peer_keys(path_); });
    EXPECT_EQ(error.code(), std::errc::invalid_argument) << line;
    EXPECT_NE(std::string(error.what()).find("line 2"), std::string::npos) << error.what();
  }
}

TEST_F(KeyFile, TellsKeysFromCommentsThoughBothMayBeginWithTheSameSign) {
  const std::string key = "#" + std::string(39, 'k');
  write(key + " decode-3\n#" + key + " taken away\n#" + key.substr(2) + " not a key\n#" + std::string(39, '\x7f') + " id\n");
  const auto keys = read_peer_keys(path_);
  ASSERT_EQ(keys.size(), 1U);
  EXPECT_EQ(keys[0].public_key, key);
  EXPECT_EQ(keys[0].peer_id, "decode-3");
}

TEST_F(KeyFile, IsMadeByTheToolForItsOwnerAlone) {
  const std::string tool = KVFERRY_TOOLS_DIR "/kvferry-keygen";
  const std::string peers = folder_ / "peers";
  const auto run = [](const std::string& command) { return ::system(command.c_str()); };
  ASSERT_EQ(run("umask 0; '" + tool + "' '" + path_ + "' decode-3 > '" + peers + "'"), 0);
  struct stat status {};
  ASSERT_EQ(::stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777U, 0600U);
  const KeyPair made = read_key_pair(path_);
  const auto keys = read_peer_keys(peers);
  ASSERT_EQ(keys.size(), 1U);
  EXPECT_EQ(keys[0].peer_id, "decode-3");
  EXPECT_EQ(keys[0].public_key, made.public_key);

  EXPECT_NE(run("'" + tool + "' '" + path_ + "' decode-3 > /dev/null 2>&1"), 0) << "it overwrites no key";
  EXPECT_EQ(read_key_pair(path_).public_key, made.public_key);
  ASSERT_EQ(run("'" + tool + "' --public '" + path_ + "' again > '" + peers + "'"), 0);
  EXPECT_EQ(read_peer_keys(peers).at(0).public_key, made.public_key);
  EXPECT_NE(run("'" + tool + "' > /dev/null 2>&1"), 0);
  EXPECT_EQ(run("test -n \"$('" + tool + "' --help 2> /dev/null)\" && '" + tool + "' --help > /dev/null"), 0);
  EXPECT_NE(run("cd '" + folder_.string() + "' && '" + tool + "' --public '" + path_ + "' > /dev/null 2>&1"), 0);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "--public")) << "a word that was left out makes no key";
  EXPECT_NE(run("'" + tool + "' '" + (folder_ / "other").string() + "' 'two\nlines' > /dev/null 2>&1"), 0);
}

TEST(Keys, OfTheEnvironmentAreTakenOutOfIt) {
  const KeyPair made = make_key_pair();
  ASSERT_EQ(::setenv("KVFERRY_TEST_KEY", made.secret_key.text(), 1), 0);
  const char* const value = std::getenv("KVFERRY_TEST_KEY");
  EXPECT_EQ(take_key_pair_from_environment("KVFERRY_TEST_KEY").public_key, made.public_key);
  EXPECT_EQ(std::getenv("KVFERRY_TEST_KEY"), nullptr);
  EXPECT_EQ(*value, '\0') << "what was there is overwritten";
  EXPECT_EQ(error_of([] { return take_key_pair_from_environment("KVFERRY_TEST_KEY"); }).code(),
            std::errc::invalid_argument);
  ASSERT_EQ(::setenv("KVFERRY_TEST_KEY", (std::string(made.secret_key.text()) + "\n").c_str(), 1), 0);
  EXPECT_EQ(take_key_pair_from_environment("KVFERRY_TEST_KEY").public_key, made.public_key) << "as the file has it";
}

TEST(Keys, AreOverwrittenWhenTheyGo) {
  alignas(SecretKey) std::array<std::byte, sizeof(SecretKey)> memory{};
  auto* const key = new (memory.data()) SecretKey(make_key_pair().secret_key);
  ASSERT_NE(*key->text(), '\0');
  key->~SecretKey();
  EXPECT_EQ(memory, decltype(memory){});
}

TEST(Keys, OfARingBelongToTheirIds) {
  const KeyPair own = make_key_pair();
  const std::string a = make_key_pair().public_key;
  const std::string b = make_key_pair().public_key;
  const std::string any = make_key_pair().public_key;
  Keyring ring(own, {{"a", a}, {"b", b}, {"a", b}, {"*", any}});
  EXPECT_TRUE(ring.may_be(a, "a"));
  EXPECT_FALSE(ring.may_be(a, "b"));
  EXPECT_TRUE(ring.may_be(b, "a"));
  EXPECT_TRUE(ring.may_be(any, "whoever"));
  EXPECT_FALSE(ring.may_be(own.public_key, "a"));
  EXPECT_FALSE(ring.may_be({}, "a"));
  EXPECT_EQ(ring.keys_of("a"), (std::vector{a, b, any}));
  EXPECT_EQ(ring.keys_of("c"), std::vector{any});
  EXPECT_EQ(ring.keys_of({}), (std::vector{a, b, any}));
  EXPECT_TRUE(ring.knows(b));
  EXPECT_FALSE(ring.knows(own.public_key));

  EXPECT_EQ(error_of([&] {
              ring.replace_peers({{"x", "no key"}});
              return 0;
            }).code(),
            std::errc::invalid_argument);
  EXPECT_EQ(error_of([&] {
              ring.replace_peers({{"", a}});
              return 0;
            }).code(),
            errc::empty_peer_id);
  EXPECT_EQ(error_of([&] {
              ring.replace_own({});
              return 0;
            }).code(),
            std::errc::invalid_argument);
  EXPECT_TRUE(ring.may_be(a, "a")) << "nothing has changed";
  EXPECT_EQ(ring.revision(), 0U);
  ring.replace_peers({{"b", b}});
  EXPECT_FALSE(ring.knows(a));
  ring.replace_own(make_key_pair());
  EXPECT_EQ(ring.revision(), 1U);
  EXPECT_EQ(error_of([&] {
              const Keyring none({}, {});
              return 0;
            }).code(),
            std::errc::invalid_argument);
}

}  // namespace
}  // namespace kvferry
