// SPDX-License-Identifier: Apache-2.0
#include <kvferry/error.hpp>

#include <gtest/gtest.h>
#include <asio/error.hpp>

#include <array>
#include <cerrno>
#include <map>
#include <set>
#include <string>
#include <system_error>
#include <vector>

namespace kvferry::inline KVFERRY_ABI {
namespace {

constexpr auto last_errc = errc::no_path;

std::vector<std::error_code> own_codes() {
  std::vector<std::error_code> codes;
  for (int value = 1; value <= static_cast<int>(last_errc); ++value) {
    codes.emplace_back(value, error_category());
  }
  return codes;
}

/// The values of those of our own codes that belong to a condition.
std::set<errc> own_codes_of(condition wanted) {
  std::set<errc> codes;
  for (const auto& code : own_codes()) {
    if (code == wanted) {
      codes.insert(static_cast<errc>(code.value()));
    }
  }
  return codes;
}

/// The category of another copy of the library, or of Asio: a plugin may have its own.
class OtherCopy final : public std::error_category {
 public:
  explicit OtherCopy(const std::error_category& own) : own_(own) {}
  [[nodiscard]] const char* name() const noexcept override { return own_.name(); }
  [[nodiscard]] std::string message(int value) const override { return own_.message(value); }

 private:
  const std::error_category& own_;
};

TEST(Error, ACodeOfAnotherCopyComparesAsThisCopysDoes) {
  const OtherCopy kvferrys(error_category());
  for (const auto& own : own_codes()) {
    const std::error_code code(own.value(), kvferrys);
    EXPECT_TRUE(code == static_cast<errc>(own.value()) && static_cast<errc>(own.value()) == code);
    EXPECT_FALSE(code == static_cast<errc>(own.value() + 1)) << own.value();
    EXPECT_EQ(error_name(code), error_name(own));
    for (const auto value : {condition::invalid_argument, condition::peer_failed, condition::retryable,
                             condition::cancelled, condition::timed_out, condition::may_still_land}) {
      EXPECT_EQ(code == value, own == value) << error_name(own);
    }
  }
  const OtherCopy asios(asio::error::get_misc_category());
  EXPECT_TRUE(std::error_code(asio::error::eof, asios) == condition::may_still_land);
  const OtherCopy strangers(std::generic_category());
  EXPECT_FALSE(std::error_code(static_cast<int>(errc::timed_out), strangers) == errc::timed_out);
}

TEST(Error, EveryCodeHasASentenceOfItsOwn) {
  std::set<std::string> sentences;
  for (const auto& code : own_codes()) {
    EXPECT_NE(code.message(), "unknown error") << code.value();
    EXPECT_TRUE(sentences.insert(code.message()).second) << code.message();
  }
  EXPECT_EQ(std::error_code(static_cast<int>(last_errc) + 1, error_category()).message(), "unknown error");
  EXPECT_EQ(std::error_code(0, error_category()).message(), "unknown error");
  EXPECT_STREQ(error_category().name(), "kvferry");
  EXPECT_STREQ(condition_category().name(), "kvferry.condition");
  EXPECT_FALSE(make_error_condition(condition::retryable).message().empty());
}

TEST(Error, EveryCodeHasANameOfItsOwn) {
  std::set<std::string> names;
  for (const auto& code : own_codes()) {
    const std::string name = error_name(code);
    EXPECT_NE(name, std::to_string(code.value()));
    EXPECT_TRUE(names.insert(name).second) << name;
  }
  EXPECT_EQ(error_name(errc::timed_out), "timed_out");
  EXPECT_EQ(error_name({999'999, error_category()}), "999999");
  EXPECT_EQ(error_name(std::make_error_code(std::errc::connection_reset)), "ECONNRESET");
  EXPECT_EQ(error_name({ECONNREFUSED, std::system_category()}), "ECONNREFUSED");
  EXPECT_EQ(error_name({ECONNREFUSED, asio::error::get_system_category()}), "ECONNREFUSED");
  EXPECT_EQ(error_name(asio::error::eof), "eof");
  EXPECT_EQ(error_name(asio::error::host_not_found), "host_not_found");
}

constexpr std::array all_conditions{condition::invalid_argument, condition::peer_failed, condition::retryable,
                                    condition::cancelled,        condition::timed_out,   condition::may_still_land};

std::set<condition> conditions_of(const std::error_code& code) {
  std::set<condition> held;
  for (const auto one : all_conditions) {
    if (code == one) {
      held.insert(one);
    }
  }
  return held;
}

TEST(Error, ConditionsHoldForTheCodesThatAreMeant) {
  EXPECT_EQ(own_codes_of(condition::invalid_argument),
            (std::set{errc::empty_peer_id,      errc::unknown_peer,        errc::self_connection,
                      errc::invalid_url,        errc::count_mismatch,      errc::unknown_region,
                      errc::index_out_of_range, errc::object_too_large,    errc::not_in_region,
                      errc::access_denied,      errc::invalid_region,      errc::notification_too_large,
                      errc::not_supported,      errc::would_deadlock,      errc::buffer_too_small,
                      errc::handshake_failed,   errc::version_mismatch,    errc::transport_mismatch,
                      errc::page_size_mismatch, errc::malformed_message,   errc::unhandled_side_message,
                      errc::invalid_peer_id,    errc::memory_fault,        errc::forked,
                      errc::invalid_range,      errc::range_out_of_bounds, errc::region_gone,
                      errc::encryption_mismatch}));
  EXPECT_EQ(
      own_codes_of(condition::peer_failed),
      (std::set{errc::peer_closed, errc::connection_lost, errc::peer_restarted, errc::fenced,
                errc::authentication_failed, errc::protocol_violation, errc::peer_restarted_in_flight, errc::no_path}));
  EXPECT_EQ(
      own_codes_of(condition::retryable),
      (std::set{errc::peer_closed, errc::connection_lost, errc::timed_out, errc::resource_limit, errc::peer_cancelled,
                errc::identity_conflict, errc::timed_out_in_flight, errc::checksum_mismatch, errc::no_path}));
  EXPECT_EQ(own_codes_of(condition::cancelled),
            (std::set{errc::cancelled, errc::closed, errc::cancelled_in_flight, errc::closed_in_flight}));
  EXPECT_EQ(own_codes_of(condition::timed_out), (std::set{errc::timed_out, errc::timed_out_in_flight}));
  EXPECT_EQ(own_codes_of(condition::may_still_land),
            (std::set{errc::connection_lost, errc::peer_closed, errc::protocol_violation, errc::timed_out_in_flight,
                      errc::cancelled_in_flight, errc::closed_in_flight, errc::peer_restarted_in_flight}));
}

TEST(Error, ACallerCanDecideUponEveryCode) {
  for (const auto& code : own_codes()) {
    EXPECT_FALSE(conditions_of(code).empty()) << code.message();
  }
  EXPECT_TRUE(conditions_of({static_cast<int>(last_errc) + 1, error_category()}).empty());
}

TEST(Error, EveryErrnoOfOursIsInTheConditionsThatItDeserves) {
  using enum condition;
  const std::map<std::set<condition>, std::vector<int>> expected{
      {{invalid_argument},
       {EINVAL, E2BIG, EFBIG, EFAULT, EMSGSIZE, EACCES, EPERM, ENOENT, ENODEV, ENOPROTOOPT, EPROTONOSUPPORT, EAFNOSUPPORT, EOPNOTSUPP,
        ENOSYS}},
      {{retryable}, {EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC, EAGAIN, EINTR, EBUSY, EADDRINUSE, EADDRNOTAVAIL}},
      {{peer_failed, retryable},
       {ECONNREFUSED, ESHUTDOWN, ENOTCONN, EHOSTUNREACH, EHOSTDOWN, ENETUNREACH, ENETDOWN, ENETRESET, EIO}},
      {{peer_failed, retryable, may_still_land},
       {ECONNRESET, ECONNABORTED, EPIPE}},  // those of connections that there were
      {{peer_failed, retryable, timed_out}, {ETIMEDOUT}},
      {{cancelled}, {ECANCELED}},
      {{}, {EBADF, ENOTSOCK, EDOM}},  // none that a call of ours ends with
  };
  for (const auto& [conditions, codes] : expected) {
    for (const int code : codes) {
      for (const auto* category :
           {&std::system_category(), &std::generic_category(), &asio::error::get_system_category()}) {
        EXPECT_EQ(conditions_of({code, *category}), conditions) << category->name() << " " << code;
      }
    }
  }
}

TEST(Error, EveryCodeOfTheResolverIsInTheConditionsThatItDeserves) {
  const std::set failed{condition::peer_failed, condition::retryable};
  for (const auto code : {asio::error::host_not_found, asio::error::host_not_found_try_again, asio::error::no_data,
                          asio::error::no_recovery}) {
    EXPECT_EQ(conditions_of(code), failed) << std::error_code(code).message();
  }
  for (const auto code : {asio::error::service_not_found, asio::error::socket_type_not_supported}) {
    EXPECT_EQ(conditions_of(code), std::set{condition::invalid_argument}) << std::error_code(code).message();
  }
}

TEST(HandshakeFaults, Line09_UnknownPeerAndFailedPeerDiffer) {
  const std::error_code unknown = errc::unknown_peer;
  EXPECT_NE(unknown, condition::peer_failed);
  EXPECT_NE(unknown, condition::retryable);
  const std::error_code lost = errc::connection_lost;
  EXPECT_EQ(lost, condition::peer_failed);
  EXPECT_NE(lost, condition::invalid_argument);
}

TEST(HandshakeFaults, Line08_TheSameCallToARestartedPeerIsNotWorthAnotherTry) {
  const std::error_code restarted = errc::peer_restarted;
  EXPECT_EQ(restarted, condition::peer_failed);
  EXPECT_NE(restarted, condition::retryable);
}

class PeerFailure : public ::testing::TestWithParam<std::error_code> {};

TEST_P(PeerFailure, IsPeerFailedAndRetryable) {
  EXPECT_EQ(GetParam(), condition::peer_failed);
  EXPECT_EQ(GetParam(), condition::retryable);
  EXPECT_NE(GetParam(), condition::cancelled);
  EXPECT_NE(GetParam(), condition::timed_out);
  EXPECT_NE(GetParam(), condition::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(
    Error, PeerFailure,
    ::testing::Values(
        std::error_code(asio::error::eof), std::error_code(asio::error::connection_reset),
        std::error_code(asio::error::host_not_found), std::error_code(asio::error::host_not_found_try_again),
        std::error_code(ECONNRESET, std::system_category()), std::error_code(ECONNRESET, std::generic_category()),
        std::error_code(EPIPE, std::system_category()), std::error_code(ECONNREFUSED, std::system_category()),
        std::error_code(ECONNABORTED, std::system_category()), std::error_code(EHOSTUNREACH, std::system_category()),
        std::error_code(EHOSTDOWN, std::system_category()), std::error_code(ENETUNREACH, std::system_category()),
        std::error_code(ENETDOWN, std::system_category()), std::error_code(ENETRESET, std::system_category()),
        std::error_code(ENOTCONN, std::system_category())));

TEST(Error, CodesOfOtherCategoriesFallUnderTheConditions) {
  EXPECT_EQ(std::error_code(asio::error::operation_aborted), condition::cancelled);
  EXPECT_NE(std::error_code(asio::error::operation_aborted), condition::retryable);
  EXPECT_EQ(std::error_code(ETIMEDOUT, std::system_category()), condition::timed_out);
  EXPECT_EQ(std::error_code(asio::error::timed_out), condition::timed_out);
  EXPECT_EQ(std::error_code(ETIMEDOUT, std::system_category()), condition::retryable);
  EXPECT_EQ(std::error_code(EINVAL, std::system_category()), condition::invalid_argument);
  EXPECT_NE(std::error_code(ENOENT, std::system_category()), condition::retryable);
}

TEST(Error, NothingIsNoCondition) {
  for (const auto wanted : all_conditions) {
    EXPECT_NE(std::error_code(), wanted);
  }
}

TEST(Error, OwnCodesCompareWithTheStandardOnes) {
  const std::error_code cancelled = errc::cancelled;
  const std::error_code timed_out = errc::timed_out;
  const std::error_code closed = errc::closed;
  EXPECT_EQ(cancelled, std::errc::operation_canceled);
  EXPECT_EQ(timed_out, std::errc::timed_out);
  EXPECT_NE(closed, std::errc::operation_canceled);
  EXPECT_EQ(std::error_code(errc::cancelled_in_flight), std::errc::operation_canceled);
  EXPECT_EQ(std::error_code(errc::timed_out_in_flight), std::errc::timed_out);
}

/// Like the code of newer Boosts: converts to a standard one, and compares with one.
struct ConvertibleCode {
  operator std::error_code() const noexcept { return errc::timed_out; }  // NOLINT(google-explicit-constructor)
  friend bool operator==(const ConvertibleCode& one, const std::error_code& other) noexcept {
    return static_cast<std::error_code>(one) == other;
  }
};

TEST(Error, CodesOfOtherLibrariesCompareByTheirOwnOperators) {
  EXPECT_TRUE(ConvertibleCode() == errc::timed_out);
  EXPECT_TRUE(errc::timed_out == ConvertibleCode());
  EXPECT_FALSE(ConvertibleCode() == errc::closed);
}

TEST(Error, TransferErrorSaysTheCodesMessageOnce) {
  const TransferError inner(errc::resource_limit, "no pages left");
  const std::string once = "no pages left: " + inner.code().message();
  EXPECT_EQ(std::string(inner.what()), once);
  EXPECT_EQ(std::string(TransferError(inner.code(), std::string("the peer answered: ") + inner.what()).what()),
            "the peer answered: " + once);
  EXPECT_EQ(std::string(TransferError(errc::closed, inner.what()).what()),
            once + ": " + make_error_code(errc::closed).message());
}

TEST(Error, TransferErrorCarriesCountCodeAndText) {
  const TransferError error(errc::timed_out, "peer \"a\"", 3);
  EXPECT_EQ(error.transferred(), 3U);
  EXPECT_EQ(error.code(), errc::timed_out);
  EXPECT_STREQ(error.what(), "peer \"a\": the deadline passed");
}

}  // namespace
}  // namespace kvferry
