// SPDX-License-Identifier: Apache-2.0
#include "../../examples/peer_pair/kv_geometry.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

namespace example {
namespace {

struct Expected {
  const char* model;
  std::uint64_t bytes_per_token;  // At 2 bytes a number.
  std::uint64_t bytes_per_block;
};

class KvGeometryOf : public testing::TestWithParam<Expected> {};

TEST_P(KvGeometryOf, IsThatOfThePublishedConfiguration) {
  const auto* geometry = find_model(GetParam().model);
  ASSERT_NE(geometry, nullptr);
  EXPECT_EQ(geometry->model, GetParam().model);
  EXPECT_EQ(geometry->bytes_per_token(2), GetParam().bytes_per_token);
  EXPECT_EQ(geometry->bytes_per_block(2), GetParam().bytes_per_block);
}

TEST_P(KvGeometryOf, ScalesWithTheSizeOfANumber) {
  const auto* geometry = find_model(GetParam().model);
  ASSERT_NE(geometry, nullptr);
  EXPECT_EQ(geometry->bytes_per_token(1) * 2, GetParam().bytes_per_token);
  EXPECT_EQ(geometry->bytes_per_token(4), GetParam().bytes_per_token * 2);
}

TEST_P(KvGeometryOf, HasOneBlockALayerForEachSixteenTokens) {
  const auto* geometry = find_model(GetParam().model);
  ASSERT_NE(geometry, nullptr);
  EXPECT_EQ(geometry->bytes_per_block(2) * geometry->num_hidden_layers, geometry->bytes_per_token(2) * 16);
}

INSTANTIATE_TEST_SUITE_P(KnownModels, KvGeometryOf,
                         testing::Values(Expected{"llama-3.1-8b", 131'072, 65'536},
                                         Expected{"llama-3.1-70b", 327'680, 65'536},
                                         Expected{"qwen2.5-7b", 57'344, 32'768},
                                         Expected{"deepseek-v3", 70'272, 18'432}),
                         [](const testing::TestParamInfo<Expected>& param) {
                           std::string name = param.param.model;
                           for (auto& letter : name) {
                             if (letter == '-' || letter == '.') {
                               letter = '_';
                             }
                           }
                           return name;
                         });

TEST(KvGeometry, EveryKnownModelIsTested) { EXPECT_EQ(known_models.size(), 4U); }

TEST(KvGeometry, AnUnknownModelIsNotFound) {
  EXPECT_EQ(find_model("llama-3.1"), nullptr);
  EXPECT_EQ(find_model(""), nullptr);
}

}  // namespace
}  // namespace example
