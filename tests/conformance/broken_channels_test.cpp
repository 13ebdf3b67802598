// SPDX-License-Identifier: Apache-2.0
//
// The suite itself, tested: a channel with a fault must fail it, one without must not.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/testing/peer_process.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {
namespace {

/// The limit of a run that does not end by itself. The suite's own limits, which are tested, are much shorter.
constexpr std::chrono::seconds run_limit{sanitized ? 290 : 110};

/// The program of broken_channel_main.cpp lies beside this one.
std::string broken_channel_program() {
  return (std::filesystem::read_symlink("/proc/self/exe").parent_path() / "kvferry_broken_channel").string();
}

struct SuiteRun {
  int status = 0;
  std::string output;

  [[nodiscard]] bool passed() const { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }
  /// Whether a test ran and did not pass: not that the program could not be started, or found nothing to run.
  [[nodiscard]] bool failed_in_a_test() const { return !passed() && output.find("[ RUN      ]") != std::string::npos; }
};

/// Runs those of the suite's tests that match the filter on channels with this fault.
SuiteRun run_suite(std::string_view fault, const std::string& filter, std::vector<std::string> variables = {}) {
  std::array<int, 2> pipe{};
  if (::pipe2(pipe.data(), O_CLOEXEC) != 0) {
    throw std::system_error(errno, std::generic_category(), "pipe2");
  }
  const FileDescriptor output(pipe[0]);
  FileDescriptor input(pipe[1]);

  const std::string program = broken_channel_program();
  std::vector<std::string> arguments{program, "--gtest_filter=" + filter, "--gtest_color=no"};
  std::vector<std::string> environment = std::move(variables);
  environment.push_back("KVFERRY_TESTING_FAULT=" + std::string(fault));
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view variable(*entry);
    if (!variable.starts_with("GTEST_") && !variable.starts_with("KVFERRY_SKIP_REPORT")) {
      environment.emplace_back(*entry);
    }
  }
  const auto pointers = [](std::vector<std::string>& strings) {
    std::vector<char*> result;
    for (std::string& string : strings) {
      result.push_back(string.data());
    }
    result.push_back(nullptr);
    return result;
  };
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, input.get(), STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, input.get(), STDERR_FILENO);
  pid_t child = 0;
  const int error = ::posix_spawn(&child, program.c_str(), &actions, nullptr, pointers(arguments).data(),
                                  pointers(environment).data());
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    throw std::system_error(error, std::generic_category(), program);
  }
  input.reset();

  SuiteRun run;
  const auto end = std::chrono::steady_clock::now() + run_limit;
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    std::array<char, 4096> chunk{};
    const ssize_t size =
        wait_readable(output.get(), left) ? ::read(output.get(), chunk.data(), chunk.size()) : ssize_t{-1};
    if (size > 0) {
      run.output.append(chunk.data(), static_cast<std::size_t>(size));
      continue;
    }
    if (size < 0) {
      ADD_FAILURE() << "the suite does not bound its tests";
      ::kill(child, SIGKILL);
    }
    break;
  }
  ::waitpid(child, &run.status, 0);
  return run;
}

/// A fault, and a test of the suite that must notice it.
struct Detection {
  const char* fault;
  const char* test;
};

void PrintTo(const Detection& detection, std::ostream* out) {
  *out << detection.fault << ", noticed by " << detection.test;
}

class BrokenChannels : public ::testing::TestWithParam<Detection> {};

TEST_P(BrokenChannels, FailTheSuite) {
  const SuiteRun run = run_suite(GetParam().fault, "Broken/" + std::string(GetParam().test));
  EXPECT_TRUE(run.failed_in_a_test()) << "status " << run.status << "\n" << run.output;
}

TEST_P(BrokenChannels, PassItWithoutTheFault) {
  const SuiteRun run = run_suite("none", "Broken/" + std::string(GetParam().test));
  EXPECT_TRUE(run.passed()) << "status " << run.status << "\n" << run.output;
  EXPECT_NE(run.output.find("[  PASSED  ] 1 test."), std::string::npos) << run.output;
}

constexpr auto detections = std::to_array<Detection>({
    {"double_completion", "OneSidedTest/Channel.WritesScatteredPages"},
    {"lost_completion", "OneSidedTest/Channel.WritesFollowEachOther"},
    {"stuck_completion", "OneSidedTest/Channel.WritesFollowEachOther"},
    {"inline_handler", "CompletionTest/Channel.NeverInline"},
    {"early_release", "OneSidedTest/Channel.WritesScatteredPages"},
    {"early_notification", "NotificationsTest/Channel.ArrivesAfterTheData"},
    {"wrong_byte", "OneSidedTest/Channel.WritesScatteredPages"},
    {"wrong_byte", "OneSidedTest/Channel.ReadsScatteredPages"},
    {"wrong_byte", "PairedTest/Channel.RecvFirst"},
    {"wrong_count", "OneSidedTest/Channel.WritesScatteredPages"},
    {"wrong_count", "OneSidedTest/Channel.ReadsScatteredPages"},
    {"wrong_count", "PairedTest/Channel.SendFirst"},
    {"whole_pages", "OneSidedTest/Channel.WritesNoMoreThanTheObject"},
    {"no_statuses", "ArgumentsTest/Channel.SuccessOverwritesStatuses"},
    {"no_statuses", "PairedTest/Channel.BufferTooSmall"},
    {"deaf_to_cancel", "CancellationTest/Channel.UnmetSendAndRecv"},
    {"endless", "DeadlinesTest/Channel.RecvWithoutSend"},
    {"deaf_to_close", "ClosingTest/Channel.CloseEndsPendingReceiveNotifications"},
    {"hanging_close", "LifecycleTest/Channel.CloseIsIdempotent"},
    {"late_write", "EndingTest/Channel.AWriteThatTimedOutDoesNotLandOverALaterOne"},
    {"unsaid_doubt", "EndingTest/Channel.AWriteThatTimedOutSaysWhetherItMayStillLand"},
    {"early_release", "EndingTest/Channel.AWriteToAPeerThatWasReplacedSaysWhetherItMayStillLand"},
    {"early_release", "EndingTest/Channel.ACloseSaysWhatMayStillLand"},
    {"late_write", "EndingTest/Channel.AfterAFenceNothingLandsOfWhatHadFailed"},
    {"hollow_fence", "EndingTest/Channel.AFenceWaitsForWhatIsUnderWay"},
    {"hollow_fence", "EndingTest/Channel.AFenceCoversWhatWaitsForAConnection"},
    {"late_read", "DeadlinesTest/Channel.StalledPeer"},
    {"lost_answer", "ClosingTest/Channel.CloseAnswersWhatWasHandedOver"},
    {"first_object_wins", "EndingTest/Channel.OfObjectsForOnePageTheLastWins"},
    {"first_object_wins", "EndingTest/Channel.OfPagesForOneBufferTheLastWins"},
    {"late_notification", "EndingTest/Channel.NoNotificationFollowsTheEndOfItsWrite"},
    {"wrong_byte", "RangesTest/Channel.OfAnySizeAtAnyOffset"},
    {"wrong_byte", "RangesTest/Channel.TenThousandRanges"},
    {"fills_gaps", "RangesTest/Channel.StridedHere"},
    {"fills_gaps", "RangesTest/Channel.UnregisteredObjects"},
    {"first_object_wins", "RangesTest/Channel.OfARangeThatIsNamedTwiceTheLastWins"},
    {"early_notification", "NotifyTest/Channel.OfARead"},
    {"keyless", "NotifyTest/Channel.KeyedOnesAreForTheirKeyAlone"},
    {"deaf_to_peers", "PeersTest/Channel.APeerThatClosesIsGone"},
    {"silent_disconnect", "PeersTest/Channel.ADisconnectLooksLikeACloseToThePeer"},
    {"any_incarnation", "MetadataTest/Channel.OfAnEarlierIncarnationIsRefused"},
    {"hasty_removal", "Regions/Channel.OperationsOfItsOwnAreWaitedForAndThenCancelled"},
    {"incapable", "LifecycleTest/Channel.OffersSomeTransfer"},
});

INSTANTIATE_TEST_SUITE_P(Faults, BrokenChannels, ::testing::ValuesIn(detections),
                         [](const ::testing::TestParamInfo<Detection>& detection) {
                           const std::string_view test(detection.param.test);
                           return std::string(detection.param.fault) + "_" +
                                  std::string(test.substr(test.rfind('.') + 1));
                         });

TEST(BrokenChannelRuns, AreToldFromProgramsThatCannotRun) {
  EXPECT_FALSE(run_suite("none", "Broken/NoSuchTest.AtAll").failed_in_a_test());
  EXPECT_FALSE(run_suite("no such fault", "Broken/NoSuchTest.AtAll").failed_in_a_test());
}

TEST(BrokenChannelRuns, ATestThatDoesNotEndIsNamedAndEndsItsProcess) {
  const SuiteRun run =
      run_suite("hanging_close", "Broken/LifecycleTest/Channel.CloseIsIdempotent", {"KVFERRY_TEST_SECONDS=1"});
  EXPECT_TRUE(WIFSIGNALED(run.status) && WTERMSIG(run.status) == SIGABRT) << run.status;
  EXPECT_NE(run.output.find("Broken/LifecycleTest/Channel.CloseIsIdempotent has not ended within"), std::string::npos)
      << run.output;
}

TEST(BrokenChannelRuns, ASuiteThatIsSkippedAsAWholeFailsUnlessTheTransportMayLackIt) {
  const std::string suite = "Broken/NotificationsTest/Channel.*";
  const SuiteRun may = run_suite("incapable", suite);
  EXPECT_TRUE(may.passed()) << may.output;
  EXPECT_NE(may.output.find("[ SKIPS    ]"), std::string::npos) << may.output;
  const SuiteRun may_not = run_suite("incapable", suite, {"KVFERRY_TESTING_LACKS_NOTHING=1"});
  EXPECT_FALSE(may_not.passed());
  EXPECT_NE(may_not.output.find("every test of Broken/NotificationsTest/Channel was skipped"), std::string::npos)
      << may_not.output;
}

TEST(BrokenChannelRuns, SkippedTestsAreNotedWithTheirReasons) {
  const std::filesystem::path report =
      std::filesystem::temp_directory_path() / ("kvferry-skips-" + std::to_string(::getpid()));
  run_suite("incapable", "Broken/OneSidedTest/Channel.BlockingForms", {"KVFERRY_SKIP_REPORT=" + report.string()});
  std::ifstream file(report);
  const std::string noted{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::filesystem::remove(report);
  EXPECT_TRUE(noted.starts_with("Capabilities::write")) << noted;
  EXPECT_TRUE(noted.ends_with("\tBroken/OneSidedTest/Channel.BlockingForms\n")) << noted;
}

}  // namespace
}  // namespace kvferry::testing
