// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/name_lookups.hpp>

#include <gtest/gtest.h>

#include <netdb.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/error.hpp>

#include <chrono>
#include <cstdlib>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "common/scripted_names.hpp"
#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

using test::get;
using test::patience;
using test::ScriptedNames;

struct Found {
  std::error_code ec;
  std::vector<std::string> addresses;
};

NameLookups::Clock::time_point soon() { return NameLookups::Clock::now() + patience; }

std::future<Found> start(NameLookups& lookups, const std::string& name,
                         NameLookups::Clock::time_point deadline = soon()) {
  const auto promise = std::make_shared<std::promise<Found>>();
  lookups.look_up(name, deadline, [promise](std::error_code ec, const std::vector<asio::ip::address>& addresses) {
    Found found{ec, {}};
    for (const auto& address : addresses) {
      found.addresses.push_back(address.to_string());
    }
    promise->set_value(found);
  });
  return promise->get_future();
}

bool comes_to_nothing(std::future<Found> future) {
  try {
    future.get();
    return false;
  } catch (const std::future_error&) {
    return true;  // the handler was dropped
  }
}

struct NameLookupsTest : ::testing::Test {
  void TearDown() override {
    names.reset();  // what is held returns now
    while (NameLookups::join_left_behind() != 0) {
      std::this_thread::yield();
    }
  }

  /// Starts lookups that don't return, and waits until they have begun.
  std::vector<std::future<Found>> start_held(NameLookups& lookups, std::size_t count, std::chrono::milliseconds time) {
    std::vector<std::future<Found>> all;
    for (std::size_t i = 0; i < count; ++i) {
      const auto name = "held" + std::to_string(i) + ".test";
      names->hold(name);
      while (names->asked(name) == 0) {
        all.push_back(start(lookups, name, NameLookups::Clock::now() + time));
        all.back().wait_for(std::chrono::milliseconds(1));
      }
    }
    return all;
  }

  std::optional<ScriptedNames> names{std::in_place};
};

TEST_F(NameLookupsTest, FamiliesTakeTurnsAndEachAddressComesOnce) {
  names->answer("a.test", {{"::1", "::1", "fd00::2", "fd00::3", "127.0.0.2", "127.0.0.3"}});
  NameLookups lookups;
  const auto found = get(start(lookups, "a.test"));
  EXPECT_FALSE(found.ec) << found.ec.message();
  EXPECT_EQ(found.addresses, (std::vector<std::string>{"::1", "127.0.0.2", "fd00::2", "127.0.0.3", "fd00::3"}));
}

TEST_F(NameLookupsTest, SuccessWithoutAnAddressIsAFailure) {
  names->answer("empty.test", {{}});
  NameLookups lookups;
  EXPECT_EQ(get(start(lookups, "empty.test")).ec, asio::error::host_not_found);
}

TEST_F(NameLookupsTest, FailuresOfTheResolverAreTold) {
  NameLookups lookups;
  names->fail("x.test", EAI_NONAME);
  EXPECT_EQ(get(start(lookups, "x.test")).ec, asio::error::host_not_found);
  names->fail("x.test", EAI_AGAIN);
  EXPECT_EQ(get(start(lookups, "x.test")).ec, asio::error::host_not_found_try_again);
  names->fail("x.test", EAI_FAIL);
  EXPECT_EQ(get(start(lookups, "x.test")).ec, asio::error::no_recovery);
  names->fail("x.test", EAI_MEMORY);
  EXPECT_EQ(get(start(lookups, "x.test")).ec, std::errc::not_enough_memory);
}

TEST_F(NameLookupsTest, ANameThatIsBeingLookedUpIsNotLookedUpAgain) {
  names->answer("a.test", {{"127.0.0.2"}});
  names->hold("a.test");
  NameLookups lookups;
  auto first = start(lookups, "a.test");
  names->wait_until_asked("a.test");
  auto second = start(lookups, "a.test");
  names->release("a.test");
  EXPECT_EQ(get(std::move(first)).addresses, std::vector<std::string>{"127.0.0.2"});
  EXPECT_EQ(get(std::move(second)).addresses, std::vector<std::string>{"127.0.0.2"});
  EXPECT_EQ(names->asked("a.test"), 1U);
}

TEST_F(NameLookupsTest, AsManyAsAreAwaitedAtMostTakePlaceAtATime) {
  names->answer("good.test", {{"127.0.0.2"}});
  NameLookups lookups;
  auto held = start_held(lookups, NameLookups::max_awaited - 1, patience);
  EXPECT_FALSE(get(start(lookups, "good.test")).ec) << "there is room for one";
  names->hold("last.test");
  auto last = start(lookups, "last.test");
  names->wait_until_asked("last.test");
  auto waits = start(lookups, "good.test");
  EXPECT_EQ(names->asked("good.test"), 1U) << "there is no room";
  names->release("held0.test");
  EXPECT_EQ(get(std::move(held[0])).ec, asio::error::host_not_found);
  EXPECT_FALSE(get(std::move(waits)).ec);
  EXPECT_EQ(names->asked("good.test"), 2U);
}

TEST_F(NameLookupsTest, ThoseThatNobodyAwaitsAnyMoreTakeNobodysPlace) {
  names->answer("good.test", {{"127.0.0.2"}});
  NameLookups lookups;
  const auto held = start_held(lookups, NameLookups::max_awaited, std::chrono::milliseconds(20));
  auto good = start(lookups, "good.test");
  while (good.wait_for(std::chrono::milliseconds(5)) != std::future_status::ready) {
    lookups.start_waiting();
  }
  EXPECT_FALSE(good.get().ec);
}

TEST_F(NameLookupsTest, CloseLeavesBehindWhatTheResolverHolds) {
  names->hold("held.test");
  std::optional<NameLookups> lookups(std::in_place);
  auto held = start(*lookups, "held.test");
  names->wait_until_asked("held.test");
  lookups->close();
  EXPECT_TRUE(comes_to_nothing(std::move(held)));
  EXPECT_TRUE(comes_to_nothing(start(*lookups, "held.test")));
  lookups.reset();
  EXPECT_EQ(NameLookups::join_left_behind(), 1U) << "it waits for the resolver still";
}

TEST(NameLookupsDeathTest, ExitDoesNotWaitForTheResolver) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  const auto exit_in_a_lookup = [](bool closed) {
    static ScriptedNames names;
    names.hold("held.test");
    static NameLookups lookups;
    (void)start(lookups, "held.test");
    names.wait_until_asked("held.test");
    if (closed) {
      lookups.close();
    }
    std::exit(0);
  };
  EXPECT_EXIT(exit_in_a_lookup(true), ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_in_a_lookup(false), ::testing::ExitedWithCode(0), "");
}

TEST_F(NameLookupsTest, AForkedChildLetsItsParentsLookupsBe) {
  names->hold("held.test");
  std::optional<NameLookups> lookups(std::in_place);
  const auto held = start(*lookups, "held.test");
  names->wait_until_asked("held.test");
  const pid_t child = ::fork();
  if (child == 0) {
    lookups.reset();
    ::_exit(NameLookups::join_left_behind() == 0 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace kvferry::kit
