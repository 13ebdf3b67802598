// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/testing/suite_options.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// One test's object of a traits type, whose type the suite's tests do not know: they are compiled once, for all
/// transports.
class TransportUnderTest {
 public:
  TransportUnderTest() = default;
  TransportUnderTest(const TransportUnderTest&) = delete;
  TransportUnderTest& operator=(const TransportUnderTest&) = delete;
  virtual ~TransportUnderTest() = default;

  [[nodiscard]] virtual TraitsFacts facts() const = 0;
  [[nodiscard]] virtual Capabilities capabilities() = 0;
  [[nodiscard]] virtual std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) = 0;
  /// Memory for a region of a `Node`.
  [[nodiscard]] virtual std::shared_ptr<std::byte> allocate(std::size_t size) = 0;
  /// Only if `TraitsFacts::answers_side_messages`.
  [[nodiscard]] virtual std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions options,
                                                                                    SideMessageAnswer answer) = 0;
};

/// The `TransportUnderTest` of a traits type.
template <ConformanceTraits Traits>
class TraitsUnderTest final : public TransportUnderTest {
 public:
  [[nodiscard]] TraitsFacts facts() const override { return TraitsFacts::of<Traits>(); }

  [[nodiscard]] Capabilities capabilities() override {
    static const Capabilities result = Traits().make_channel(suite_options())->capabilities();
    return result;
  }

  [[nodiscard]] std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) override {
    return traits_.make_channel(std::move(options));
  }

  [[nodiscard]] std::shared_ptr<std::byte> allocate(std::size_t size) override {
    if constexpr (requires { traits_.allocate(size); }) {
      return traits_.allocate(size);
    } else {
      const std::shared_ptr<std::byte[]> made = std::make_unique_for_overwrite<std::byte[]>(size);
      return {made, made.get()};
    }
  }

  [[nodiscard]] std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions options,
                                                                            SideMessageAnswer answer) override {
    if constexpr (requires { traits_.make_answering_channel(std::move(options), std::move(answer)); }) {
      return traits_.make_answering_channel(std::move(options), std::move(answer));
    } else {
      throw std::logic_error("the traits have no make_answering_channel");
    }
  }

 private:
  Traits traits_;
};

/// A transport whose tests are called `prefix/Suite/name.Test`.
struct TransportDefinition {
  std::string prefix;
  std::string name;
  std::unique_ptr<TransportUnderTest> (*make)();
  bool (*takes)(std::string_view suite);
};

/// A suite of tests that runs for every transport.
struct SuiteDefinition {
  struct Test {
    std::string name;
    std::function<::testing::Test*(std::unique_ptr<TransportUnderTest>)> make;
  };
  std::string name;
  const char* file;
  int line;
  std::vector<Test> tests;
};

/// The suites and the transports of a program. Each suite's tests are registered at GoogleTest for each transport, in
/// whatever order suites and transports, which may be of different source files, come. To be used before `main` only.
class ConformanceRegistry {
 public:
  static ConformanceRegistry& instance() {
    static ConformanceRegistry registry;
    return registry;
  }

  /// @return true, for a variable whose initialisation adds the suite.
  bool add(SuiteDefinition suite) {
    for (const TransportDefinition& transport : transports_) {
      register_tests(suite, transport);
    }
    suites_.push_back(std::move(suite));
    return true;
  }

  template <ConformanceTraits... Traits>
  bool add_transports(const std::string& prefix) {
    int number = 0;
    (add({prefix, name_of<Traits>(number++), &make<Traits>, &takes<Traits>}), ...);
    return true;
  }

  /// Whether the program has transports, but no suite for them.
  [[nodiscard]] bool lacks_suites() const { return suites_.empty() && !transports_.empty(); }

 private:
  template <class Traits>
  [[nodiscard]] static std::unique_ptr<TransportUnderTest> make() {
    return std::make_unique<TraitsUnderTest<Traits>>();
  }

  template <class Traits>
  [[nodiscard]] static bool takes(std::string_view suite) {
    if constexpr (requires { Traits::takes(suite); }) {
      return Traits::takes(suite);
    } else {
      return true;
    }
  }

  void add(TransportDefinition transport) {
    for (const SuiteDefinition& suite : suites_) {
      register_tests(suite, transport);
    }
    transports_.push_back(std::move(transport));
  }

  static void register_tests(const SuiteDefinition& suite, const TransportDefinition& transport) {
    if (!transport.takes(suite.name)) {
      return;
    }
    const std::string suite_name = transport.prefix + "/" + suite.name + "/" + transport.name;
    for (const SuiteDefinition::Test& test : suite.tests) {
      ::testing::RegisterTest(
          suite_name.c_str(), test.name.c_str(), nullptr, nullptr, suite.file, suite.line,
          [make_test = test.make, make_transport = transport.make] { return make_test(make_transport()); });
    }
  }

  std::vector<SuiteDefinition> suites_;
  std::vector<TransportDefinition> transports_;
};

}  // namespace kvferry::testing
