// SPDX-License-Identifier: Apache-2.0
#include "rdma/work_planner.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::uint64_t remote_base = std::uint64_t{1} << 40;
constexpr std::uint32_t first_key = 100;

/// A batch, planned to its end; what the requests say is carried out in memory.
class WorkPlannerTest : public ::testing::Test {
 protected:
  /// Registers local memory in slices of this size, and gives the remote region slices of that.
  void use(std::size_t local_bytes, std::size_t local_slice, std::size_t remote_bytes, std::size_t remote_slice) {
    table_.clear();
    local_.resize(local_bytes);
    std::mt19937 random(1);
    for (std::byte& byte : local_) {
      byte = static_cast<std::byte>(random());
    }
    const std::uint64_t base = address_of(local_.data());
    std::uint32_t key = 1;
    for (std::size_t begin = 0; begin < local_bytes; begin += local_slice) {
      table_.add({base + begin, base + std::min(begin + local_slice, local_bytes), key++, 0, false, false});
    }
    remote_.assign(remote_bytes, std::byte{0});
    region_.address = remote_base;
    region_.slice_bytes = remote_slice;
    region_.keys.resize((remote_bytes - 1) / remote_slice + 1);
    std::iota(region_.keys.begin(), region_.keys.end(), first_key);
  }

  [[nodiscard]] MutableBuffer at(std::size_t offset, std::size_t size) { return {local_.data() + offset, size}; }

  /// Plans all, in lists of any number of requests. @return how many requests there were.
  std::size_t plan_all(const std::vector<MutableBuffer>& objects, const std::vector<std::uint64_t>& indexes,
                       std::size_t page_size, const RequestLimits& limits, std::size_t requests_a_list = 64) {
    return plan_all(kit::LocalBytes(objects, {}), RemoteMemory(region_, page_size, indexes), limits, requests_a_list);
  }

  /// The same of ranges.
  std::size_t plan_all(const std::vector<MutableBuffer>& objects, const std::vector<RemoteRange>& ranges,
                       const std::vector<LocalStride>& strides, const RequestLimits& limits,
                       std::size_t requests_a_list = 64) {
    return plan_all(kit::LocalBytes(objects, strides), RemoteMemory(list_of({region_}), 0, ranges), limits,
                    requests_a_list);
  }

  std::size_t plan_all(const kit::LocalBytes& objects, const RemoteMemory& remote, const RequestLimits& limits,
                       std::size_t requests_a_list) {
    WorkPlanner planner(objects, {0, objects.count()}, remote);
    std::size_t requests = 0;
    auto list = std::make_unique<WorkList>();
    while (!planner.done()) {
      list->clear();
      const std::size_t before = planner.next_object();
      const std::size_t bytes =
          planner.plan(*list, IBV_WR_RDMA_WRITE, limits, requests_a_list, std::size_t{1} << 30, table_, nullptr);
      EXPECT_GE(planner.next_object(), before);
      EXPECT_EQ(list->bytes_written, bytes);
      if (list->empty()) {
        ADD_FAILURE() << "no progress";
        return requests;
      }
      EXPECT_LE(list->size(), requests_a_list);
      requests += list->size();
      carry_out(list->finish(), limits);
    }
    return requests;
  }

  void expect_moved(const std::vector<MutableBuffer>& objects, const std::vector<std::uint64_t>& indexes,
                    std::size_t page_size) {
    for (std::size_t i = 0; i < objects.size(); ++i) {
      ASSERT_EQ(std::memcmp(remote_.data() + indexes[i] * page_size, objects[i].data(), objects[i].size()), 0)
          << "object " << i;
    }
  }

  /// Compares all of the remote memory with what a copy byte by byte makes.
  void expect_moved(const std::vector<MutableBuffer>& objects, const std::vector<RemoteRange>& ranges,
                    const std::vector<LocalStride>& strides) {
    std::vector<std::byte> expected(remote_.size());
    for (std::size_t i = 0; i < objects.size(); ++i) {
      const LocalStride stride = strides.empty() || strides[i].block_size == 0
                                     ? LocalStride{objects[i].size(), objects[i].size()}
                                     : strides[i];
      for (std::uint64_t byte = 0; byte < ranges[i].size * ranges[i].count; ++byte) {
        expected[ranges[i].offset + byte / ranges[i].size * ranges[i].stride + byte % ranges[i].size] =
            objects[i][byte / stride.block_size * stride.stride + byte % stride.block_size];
      }
    }
    ASSERT_TRUE(remote_ == expected);
  }

  /// Regions 0, 1 and so on, which pass as long as the test takes.
  const PeerRegionList& list_of(const std::vector<RegionKeys>& regions) {
    std::vector<std::shared_ptr<const PeerRegion>> all;
    for (const RegionKeys& keys : regions) {
      all.push_back(std::make_shared<PeerRegion>(PeerRegion{static_cast<std::uint32_t>(all.size()), 0, {keys}}));
    }
    return lists_.emplace_back(std::move(all));
  }

 private:
  void carry_out(const ibv_send_wr* request, const RequestLimits& limits) {
    for (; request != nullptr; request = request->next) {
      EXPECT_EQ((request->send_flags & IBV_SEND_SIGNALED) != 0, request->next == nullptr);
      ASSERT_GE(request->num_sge, 1);
      EXPECT_LE(static_cast<std::size_t>(request->num_sge), limits.pieces);
      std::uint64_t target = request->wr.rdma.remote_addr - remote_base;
      const std::uint64_t slice = target / region_.slice_bytes;
      EXPECT_EQ(request->wr.rdma.rkey, first_key + slice);
      std::size_t total = 0;
      for (int i = 0; i < request->num_sge; ++i) {
        const ibv_sge& piece = request->sg_list[i];
        const Slice* hint = nullptr;
        const Slice* const local = table_.find(piece.addr, hint);
        ASSERT_NE(local, nullptr);
        EXPECT_EQ(piece.lkey, local->local_key);
        EXPECT_LE(piece.addr + piece.length, local->end) << "a piece that goes beyond its slice";
        ASSERT_LE(target + piece.length, remote_.size());
        std::memcpy(remote_.data() + target, reinterpret_cast<const void*>(piece.addr), piece.length);
        target += piece.length;
        total += piece.length;
      }
      EXPECT_LE(target, (slice + 1) * region_.slice_bytes) << "a request that goes beyond its slice";
      EXPECT_LE(total, limits.bytes);
    }
  }

  std::vector<std::byte> local_;
  std::vector<std::byte> remote_;
  SliceTable table_;
  RegionKeys region_;
  std::deque<PeerRegionList> lists_;
};

constexpr std::size_t page = 4096;

std::vector<std::uint64_t> consecutive(std::size_t count) {
  std::vector<std::uint64_t> indexes(count);
  std::iota(indexes.begin(), indexes.end(), std::uint64_t{0});
  return indexes;
}

TEST_F(WorkPlannerTest, Line22_AdjacentOnBothSidesIsOneRequestOfOnePiece) {
  use(256 * page, 256 * page, 256 * page, 256 * page);
  std::vector<MutableBuffer> objects;
  for (std::size_t i = 0; i < 256; ++i) {
    objects.push_back(at(i * page, page));
  }
  EXPECT_EQ(plan_all(objects, consecutive(256), page, {.pieces = 1}), 1U);
  expect_moved(objects, consecutive(256), page);
}

TEST_F(WorkPlannerTest, Line22_AdjacentAtThePeerIsGathered) {
  use(512 * page, 512 * page, 256 * page, 256 * page);
  std::vector<MutableBuffer> objects;
  for (std::size_t i = 0; i < 256; ++i) {
    objects.push_back(at(2 * i * page, page));
  }
  EXPECT_EQ(plan_all(objects, consecutive(256), page, {.pieces = 16}), 16U);
  expect_moved(objects, consecutive(256), page);
}

TEST_F(WorkPlannerTest, Line22_ScatteredAtThePeerIsOneRequestAPage) {
  use(100 * page, 100 * page, 300 * page, 300 * page);
  std::vector<MutableBuffer> objects;
  std::vector<std::uint64_t> indexes;
  for (std::size_t i = 0; i < 100; ++i) {
    objects.push_back(at(i * page, page));
    indexes.push_back(299 - 3 * i);
  }
  EXPECT_EQ(plan_all(objects, indexes, page, {.pieces = 16}), 100U);
  expect_moved(objects, indexes, page);
}

TEST_F(WorkPlannerTest, Line22_ObjectsThatDontFillTheirPagesAreNotMerged) {
  use(4 * page, 4 * page, 4 * page, 4 * page);
  const std::vector<MutableBuffer> objects{at(0, page - 1), at(page - 1, page), at(2 * page - 1, page)};
  EXPECT_EQ(plan_all(objects, consecutive(3), page, {.pieces = 16}), 2U);
  expect_moved(objects, consecutive(3), page);
}

TEST_F(WorkPlannerTest, Line22_RequestsAreCutAtTheLargestMessage) {
  use(1'000'000, 1'000'000, 1'000'000, 1'000'000);
  const std::vector<MutableBuffer> objects{at(0, 1'000'000)};
  EXPECT_EQ(plan_all(objects, {0}, 1'000'000, {.pieces = 4, .bytes = 65'536}), 16U);
  expect_moved(objects, {0}, 1'000'000);
}

TEST_F(WorkPlannerTest, Line23_RequestsAreCutAtTheBordersOfSlices) {
  // 10 pages of 4096 bytes in slices of 3 pages here, 5,000 bytes there.
  use(10 * page, 3 * page, 10 * page, 5000);
  const std::vector<MutableBuffer> objects{at(0, 10 * page)};
  EXPECT_EQ(plan_all(objects, {0}, 10 * page, {.pieces = 4}), 9U);
  expect_moved(objects, {0}, 10 * page);
}

TEST_F(WorkPlannerTest, EmptyObjectsMakeNoRequests) {
  use(4 * page, 4 * page, 8 * page, 8 * page);
  const std::vector<MutableBuffer> objects{{}, at(0, 10), {}, {}, at(20, 10), {}};
  EXPECT_EQ(plan_all(objects, consecutive(6), page, {.pieces = 4}), 2U);
  expect_moved({at(0, 10), at(20, 10)}, {1, 4}, page);

  const std::vector<MutableBuffer> nothing(3);
  EXPECT_EQ(plan_all(nothing, consecutive(3), page, {.pieces = 4}), 0U);
}

TEST_F(WorkPlannerTest, SkippedObjectsDontMove) {
  use(4 * page, 4 * page, 4 * page, 4 * page);
  const std::vector<MutableBuffer> objects{at(0, page), at(page, page), at(2 * page, page)};
  std::vector<PostedBuffer> buffers{{page, remote_base, first_key, 1}, {}, {page, remote_base + page, first_key, 1}};
  WorkPlanner planner(kit::LocalBytes(objects, {}), {0, 3}, RemoteMemory(buffers), {false, true, false});
  SliceTable table;
  table.add({address_of(objects[0].data()), address_of(objects[0].data()) + 4 * page, 1, 0, false, false});
  auto list = std::make_unique<WorkList>();
  EXPECT_EQ(planner.plan(*list, IBV_WR_RDMA_WRITE, {.pieces = 4}, 64, std::size_t{1} << 30, table, nullptr), 2 * page);
  EXPECT_TRUE(planner.done());
  ASSERT_EQ(list->size(), 1U);
  EXPECT_EQ((*list)[0].num_sge, 2);
}

TEST_F(WorkPlannerTest, AnyBatchIsMovedWholly) {
  std::mt19937 random(7);
  const auto upto = [&](std::size_t most) { return static_cast<std::size_t>(random() % (most + 1)); };
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE(round);
    const std::size_t page_size = 1 + upto(600);
    const std::size_t pages = 1 + upto(60);
    use(pages * page_size, 1 + upto(2000), pages * page_size, 1 + upto(2000));
    std::vector<std::uint64_t> indexes = consecutive(pages);
    if (round % 2 == 0) {
      std::shuffle(indexes.begin(), indexes.end(), random);
    }
    std::vector<MutableBuffer> objects;
    for (std::size_t i = 0; i < pages; ++i) {
      objects.push_back(at(i * page_size, round % 3 == 0 ? page_size : upto(page_size)));
    }
    plan_all(objects, indexes, page_size, {.pieces = 1 + upto(5), .bytes = 1 + upto(3000)}, 1 + upto(20));
    expect_moved(objects, indexes, page_size);
    if (HasFailure()) {
      return;
    }
  }
}

TEST_F(WorkPlannerTest, Line22_AdjacentRangesAreOneRequest) {
  use(256 * page, 256 * page, 256 * page, 256 * page);
  std::vector<MutableBuffer> objects;
  std::vector<RemoteRange> ranges;
  for (std::size_t i = 0; i < 100; ++i) {
    objects.push_back(at(i * 2000, 2000));
    ranges.push_back(RemoteRange::contiguous(0, 77 + i * 2000, 2000));
  }
  EXPECT_EQ(plan_all(objects, ranges, {}, {.pieces = 1}), 1U);
  expect_moved(objects, ranges, {});
  // Blocks that touch are no blocks, and what follows the last one joins it.
  const std::vector<MutableBuffer> two{at(0, 64'000), at(64'000, 50)};
  const std::vector<RemoteRange> dense{RemoteRange::strided(0, 5, 64, 64, 1000),
                                       RemoteRange::contiguous(0, 64'005, 50)};
  use(256 * page, 256 * page, 256 * page, 256 * page);
  EXPECT_EQ(plan_all(two, dense, {}, {.pieces = 1}), 1U);
  expect_moved(two, dense, {});
}

TEST_F(WorkPlannerTest, Line22_BlocksThatTheSidesShareAreRequestsOrPieces) {
  use(256 * page, 256 * page, 256 * page, 256 * page);
  const std::vector<MutableBuffer> contiguous{at(0, 64 * 512)};
  const std::vector<RemoteRange> strided{RemoteRange::strided(0, 100, 512, 1024, 64)};
  EXPECT_EQ(plan_all(contiguous, strided, {}, {.pieces = 16}), 64U) << "a request for each block at the peer";
  expect_moved(contiguous, strided, {});

  use(256 * page, 256 * page, 256 * page, 256 * page);
  const std::vector<LocalStride> strides{{512, 1024}};
  const std::vector<MutableBuffer> blocks{at(0, 63 * 1024 + 512)};
  const std::vector<RemoteRange> plain{RemoteRange::contiguous(0, 100, 64 * 512)};
  EXPECT_EQ(plan_all(blocks, plain, strides, {.pieces = 16}), 4U) << "a piece for each block here";
  expect_moved(blocks, plain, strides);

  use(256 * page, 256 * page, 256 * page, 256 * page);
  const std::vector<RemoteRange> larger{RemoteRange::strided(0, 100, 2048, 4096, 16)};
  EXPECT_EQ(plan_all(blocks, larger, strides, {.pieces = 16}), 16U);
  expect_moved(blocks, larger, strides);
}

TEST_F(WorkPlannerTest, RangesOfSeveralRegionsHaveTheirKeys) {
  use(4 * page, 4 * page, 8 * page, 8 * page);
  // The regions lie end to end, and their keys differ.
  const std::vector<RegionKeys> regions{{remote_base, 2 * page, {100}}, {remote_base + 2 * page, 2 * page, {200}}};
  const std::vector<RemoteRange> ranges{RemoteRange::contiguous(1, page, 10), RemoteRange::contiguous(0, page, page),
                                        RemoteRange::contiguous(1, 0, page)};
  const std::vector<MutableBuffer> objects{at(0, 10), at(10, page), at(10 + page, page)};
  WorkPlanner planner(kit::LocalBytes(objects, {}), {0, 3}, RemoteMemory(list_of(regions), 0, ranges));
  SliceTable table;
  table.add({address_of(objects[0].data()), address_of(objects[0].data()) + 4 * page, 1, 0, false, false});
  auto list = std::make_unique<WorkList>();
  EXPECT_EQ(planner.plan(*list, IBV_WR_RDMA_READ, {.pieces = 4}, 64, std::size_t{1} << 30, table, nullptr),
            2 * page + 10);
  ASSERT_EQ(list->size(), 3U);
  EXPECT_EQ((*list)[0].wr.rdma.remote_addr, remote_base + 3 * page);
  EXPECT_EQ((*list)[0].wr.rdma.rkey, 200U);
  EXPECT_EQ((*list)[1].wr.rdma.remote_addr, remote_base + page);
  EXPECT_EQ((*list)[1].wr.rdma.rkey, 100U);
  EXPECT_EQ((*list)[2].wr.rdma.remote_addr, remote_base + 2 * page);
  EXPECT_EQ((*list)[2].wr.rdma.rkey, 200U);
}

TEST_F(WorkPlannerTest, AnyRangesAreMovedWholly) {
  std::mt19937 random(8);
  const auto upto = [&](std::uint64_t most) { return random() % (most + 1); };
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE(round);
    std::vector<RemoteRange> ranges;
    std::vector<LocalStride> strides;
    std::vector<std::size_t> sizes;
    std::size_t local_bytes = 1;
    std::uint64_t remote_bytes = 1;
    for (std::uint64_t i = upto(12); i != 0; --i) {
      const std::uint64_t here = 1 + upto(50);
      const std::uint64_t there = 1 + upto(50);
      const std::uint64_t times = upto(4);  // how often blocks of both sizes fill the same bytes
      ranges.push_back(RemoteRange::strided(0, remote_bytes, there, there + upto(1) * upto(30), here * times));
      strides.push_back({here, here + upto(1) * upto(30)});
      sizes.push_back(times == 0 ? 0 : (there * times - 1) * strides.back().stride + here);
      remote_bytes += ranges.back().stride * ranges.back().count + upto(1) * 7;
      local_bytes += sizes.back() + upto(1) * 7;
    }
    use(local_bytes, 1 + upto(2000), static_cast<std::size_t>(remote_bytes), 1 + upto(2000));
    std::vector<MutableBuffer> objects;
    std::size_t begin = 0;
    for (const std::size_t size : sizes) {
      objects.push_back(at(begin, size));
      begin += size;
    }
    plan_all(objects, ranges, strides, {.pieces = 1 + upto(5), .bytes = 1 + upto(3000)}, 1 + upto(20));
    expect_moved(objects, ranges, strides);
    if (HasFatalFailure() || HasFailure()) {
      return;
    }
  }
}

}  // namespace
}  // namespace kvferry::rdma
