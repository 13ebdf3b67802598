// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/chunk.hpp>

#include <gtest/gtest.h>

#include <vector>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

/// Cuts objects of these sizes and checks that every byte is in exactly one piece, in order. @return the chunks' number.
std::size_t check(const std::vector<std::size_t>& sizes, std::vector<bool> refused = {}) {
  std::vector<std::byte> memory(1);
  std::vector<MutableBuffer> objects;
  for (const std::size_t size : sizes) {
    objects.emplace_back(memory.data(), size);  // only the sizes matter
  }
  ChunkCursor cursor(objects, {0, objects.size()});
  cursor.refuse(refused);
  std::size_t object = 0;
  std::size_t offset = 0;
  std::size_t chunks = 0;
  while (!cursor.done()) {
    const Chunk chunk = cursor.next();
    ++chunks;
    EXPECT_LE(chunk.count, sent_chunk_objects);
    EXPECT_LE(chunk.bytes, max_chunk_bytes);
    EXPECT_GT(chunk.count, 0U);
    std::size_t bytes = 0;
    cursor.for_each_piece(chunk, [&](const Piece& piece) {
      EXPECT_EQ(piece.object, object);
      EXPECT_EQ(piece.offset, offset);
      bytes += piece.length;
      offset += piece.length;
      EXPECT_EQ(piece.refused, !refused.empty() && refused[object]);
      const std::size_t size = piece.refused ? 0 : sizes[object];
      EXPECT_EQ(piece.completes, offset == size);
      if (piece.completes) {
        ++object;
        offset = 0;
      }
    });
    EXPECT_EQ(bytes, chunk.bytes);
  }
  EXPECT_EQ(object, sizes.size());
  return chunks;
}

TEST(ChunkCursor, CutsBatchesCompletely) {
  EXPECT_EQ(check({1}), 1U);
  EXPECT_EQ(check({0}), 1U);
  EXPECT_EQ(check({0, 0, 5, 0}), 1U);
  EXPECT_EQ(check(std::vector<std::size_t>(256, 4096)), 1U);
  EXPECT_EQ(check(std::vector<std::size_t>(257, 4096)), 2U);
  EXPECT_EQ(check(std::vector<std::size_t>(sent_chunk_objects, 1)), 1U);
  EXPECT_EQ(check(std::vector<std::size_t>(sent_chunk_objects + 1, 1)), 2U);
  EXPECT_EQ(check({max_chunk_bytes}), 1U);
  EXPECT_EQ(check({max_chunk_bytes + 1}), 2U);
  EXPECT_EQ(check({10 * max_chunk_bytes + 3, 7, 2 * max_chunk_bytes}), 13U);
  EXPECT_EQ(check(std::vector<std::size_t>(100'000, 4096)), 391U);
}

TEST(ChunkCursor, RefusedObjectsTakeNoBytes) {
  EXPECT_EQ(check({max_chunk_bytes, max_chunk_bytes, 5}, {true, true, false}), 1U);
  EXPECT_EQ(check({5}, {true}), 1U);
}

TEST(ChunkCursor, CoversOnlyItsRange) {
  std::vector<std::byte> memory(10);
  const std::vector<MutableBuffer> objects(10, MutableBuffer(memory));
  ChunkCursor cursor(objects, {3, 5});
  const Chunk chunk = cursor.next();
  EXPECT_EQ(chunk.first, 3U);
  EXPECT_EQ(chunk.count, 2U);
  EXPECT_TRUE(cursor.done());
}

TEST(ChunkCursor, CountsThePiecesOfMemoryOnEitherSide) {
  std::vector<std::byte> memory(1);
  // 3,000 blocks of 2 bytes here, 2,000 of 3 there; nothing; more than a frame's bytes in blocks of 1,000.
  const std::vector<MutableBuffer> objects{
      {memory.data(), 2999 * 4 + 2}, {memory.data(), 0}, {memory.data(), 2'000'000}};
  const std::vector<LocalStride> strides{{2, 4}, {}, {}};
  const std::vector<RemoteRange> ranges{RemoteRange::strided(0, 0, 3, 5, 2000), RemoteRange::contiguous(0, 0, 0),
                                        RemoteRange::strided(0, 0, 1000, 1001, 2000)};
  ChunkCursor cursor(objects, {0, 3}, strides, ranges);
  std::size_t chunks = 0;
  std::vector<std::size_t> bytes(3);
  while (!cursor.done()) {
    const Chunk chunk = cursor.next();
    ++chunks;
    std::uint64_t here = 0;
    std::uint64_t there = 0;
    std::size_t moved = 0;
    cursor.for_each_piece(chunk, [&](const Piece& piece) {
      EXPECT_EQ(piece.offset, bytes[piece.object]);
      bytes[piece.object] += piece.length;
      EXPECT_EQ(piece.completes, bytes[piece.object] == cursor.local().size(piece.object));
      moved += piece.length;
      here += cursor.local().blocks(piece.object).pieces(piece.offset, piece.length);
      there += kit::Blocks::of(ranges[piece.object]).pieces(piece.offset, piece.length);
    });
    EXPECT_EQ(moved, chunk.bytes);
    EXPECT_LE(chunk.bytes, max_chunk_bytes);
    EXPECT_LE(here, sent_chunk_objects);
    EXPECT_LE(there, sent_chunk_objects);
  }
  EXPECT_EQ(bytes, (std::vector<std::size_t>{6000, 0, 2'000'000}));
  EXPECT_EQ(chunks, 5U) << "three for the first object's pieces, the last of which has room for a part of the third";
}

}  // namespace
}  // namespace kvferry::tcp
