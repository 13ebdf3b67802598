// SPDX-License-Identifier: Apache-2.0
// Channels whose certificates are replaced while they work.
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "certified.hpp"
#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

TEST_F(Certified, FilesThatChangeAreTakenUpWithoutARestart) {
  Node a(certified_pages, with(a_files_, &a_log_), false);
  Node b(certified_pages, with(b_files_, &b_log_));
  ASSERT_FALSE(connect(a, b));
  expect_pages_move(a, b, 1);
  // All of it anew, the authority as well.
  const Identity new_ca = authority("new ca");
  const Identity new_a = issue({.name = "a", .by = &new_ca});
  const Identity new_b = issue({.name = "b", .by = &new_ca});
  a_files_.set(new_a, new_ca);
  expect_pages_move(a, b, 2);  // over the connection that there is
  a.channel->disconnect("b");
  std::string diagnostic;
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed) << "b's is of the old one";
  EXPECT_TRUE(has(diagnostic, "data connection to peer 'b'") &&
              has(diagnostic, "unable to get local issuer certificate") && has(diagnostic, b_own_.sha256()))
      << diagnostic;
  EXPECT_EQ(a_log_.count("certificates_replaced", new_a.sha256()), 1U) << a_log_.all();
  b_files_.set(new_b, new_ca);
  EXPECT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  EXPECT_EQ(b_log_.count("certificates_replaced", new_b.sha256()), 1U) << b_log_.all();
  expect_pages_move(a, b, 3);
}

TEST_F(Certified, ABrokenFileLeavesTheOldOnesInForceAndIsLogged) {
  Node a(certified_pages, with(a_files_), false);
  Node b(certified_pages, with(b_files_, &b_log_));
  const std::string chain = b_files_.files().chain;
  const auto connects_anew = [&] {
    std::error_code ignored;  // the first time there is nobody
    a.channel->disconnect("b", ignored);
    std::string diagnostic;
    EXPECT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
  };
  connects_anew();
  CertificateDirectory::put(chain, "-----BEGIN CERTIFICATE-----\nnonsense");
  connects_anew();
  connects_anew();
  EXPECT_EQ(b_log_.count("certificates_not_replaced", chain), 1U) << b_log_.all();
  EXPECT_EQ(b_log_.count("certificates_not_replaced", b_own_.sha256()), 1U) << "that it goes on with";
  const Identity late = issue({.name = "late", .by = &ca_, .key = b_own_.key, .from = -7200, .to = -60});
  CertificateDirectory::put(chain, late.pem());
  connects_anew();
  EXPECT_EQ(b_log_.count("certificates_not_replaced", "has expired"), 1U) << b_log_.all();
  CertificateDirectory::put(b_files_.files().key, b_own_.key_pem(), 0644);
  connects_anew();
  const Identity fresh = issue({.name = "fresh", .by = &ca_, .key = b_own_.key});
  CertificateDirectory::put(chain, fresh.pem());
  CertificateDirectory::put(b_files_.files().key, b_own_.key_pem());
  connects_anew();
  EXPECT_EQ(b_log_.count("certificates_replaced", fresh.sha256()), 1U) << b_log_.all();
}

TEST_F(Certified, NothingFailsWhileFilesAreReplacedUnderTraffic) {
  Node b(certified_pages, with(b_files_, &b_log_));
  std::vector<std::unique_ptr<Node>> dialing;
  for (int i = 0; i < 2; ++i) {
    dialing.push_back(std::make_unique<Node>(certified_pages, with(a_files_, &a_log_), false));
  }
  std::atomic<bool> over = false;
  std::atomic<int> connects = 0;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < dialing.size(); ++i) {
    threads.emplace_back([&, i] {
      Node& a = *dialing[i];
      const std::string id = "a" + std::to_string(i);
      const auto all = indexes(certified_pages);
      while (!over) {
        std::string diagnostic;
        EXPECT_FALSE(connect(a, b, &diagnostic, id)) << diagnostic;
        std::error_code ec;
        for (int k = 0; k < 3 && !ec; ++k) {
          (void)a.channel->batched_read(a.pages(certified_pages), {.peer_id = "b", .remote_indexes = all}, ec);
        }
        EXPECT_FALSE(ec) << ec.message();
        a.channel->disconnect("b", ec);
        ++connects;
      }
    });
  }
  // Each file by itself, as a tool does it that knows nothing of the others.
  for (int round = 0; round < 30; ++round) {
    const int before = connects;
    a_files_.set(issue({.name = "a", .by = &ca_}), ca_);
    b_files_.set(issue({.name = "b", .by = &ca_}), ca_);
    while (connects == before && !HasFailure()) {
      std::this_thread::yield();
    }
  }
  over = true;
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_GT(a_log_.count("certificates_replaced"), 0U);
  EXPECT_GT(b_log_.count("certificates_replaced"), 0U);
}

TEST_F(Certified, ACaIsReplacedInItsStepsAndNothingFails) {
  Node a(certified_pages, with(a_files_, &a_log_), false);
  Node b(certified_pages, with(b_files_, &b_log_));
  std::atomic<bool> over = false;
  std::atomic<int> connects = 0;
  std::thread traffic([&] {
    while (!over) {
      std::string diagnostic;
      EXPECT_FALSE(connect(a, b, &diagnostic)) << diagnostic;
      std::error_code ec;
      (void)a.channel->batched_read(a.pages(certified_pages),
                                    {.peer_id = "b", .remote_indexes = indexes(certified_pages)}, ec);
      EXPECT_FALSE(ec) << ec.message();
      a.channel->disconnect("b", ec);
      ++connects;
    }
  });
  const auto go_on = [&] {
    const int before = connects;
    while (connects < before + 2 && !HasFailure()) {
      std::this_thread::yield();
    }
  };
  const Identity new_ca = authority("new ca");
  const Identity new_a = issue({.name = "a", .by = &new_ca});
  const Identity new_b = issue({.name = "b", .by = &new_ca});
  go_on();
  for (const auto* files : {&a_files_, &b_files_}) {
    CertificateDirectory::put(files->files().trusted, ca_.pem() + new_ca.pem());
    go_on();
  }
  for (const auto& [files, own] : {std::pair(&a_files_, new_a), std::pair(&b_files_, new_b)}) {
    CertificateDirectory::put(files->files().chain, own.pem());
    CertificateDirectory::put(files->files().key, own.key_pem());
    go_on();
  }
  for (const auto* files : {&a_files_, &b_files_}) {
    CertificateDirectory::put(files->files().trusted, new_ca.pem());
    go_on();
  }
  over = true;
  traffic.join();
  EXPECT_EQ(a_log_.count("certificates_replaced", new_a.sha256() + ", valid"), 2U) << a_log_.all();
  EXPECT_EQ(a_log_.count("certificates_replaced", "this side goes on showing"), 2U) << a_log_.all();
}

}  // namespace
}  // namespace kvferry::tcp::testing
