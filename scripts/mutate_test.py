# SPDX-License-Identifier: Apache-2.0
"""Tests of what mutate.py changes; run by ctest."""
import unittest

import mutate


def changes(line):
    return {(m.kind, m.new.strip()) for m in mutate.mutants_of_line("src/tcp/x.cpp", 1, line + "\n")}


class Mutants(unittest.TestCase):
    def test_comparisons_and_conditions(self):
        found = changes("  if (offset > limit || size == 0) {")
        self.assertEqual(found, {
            ("compare", "if (offset >= limit || size == 0) {"),
            ("compare2", "if (offset > limit || size != 0) {"),
            ("logic", "if (offset > limit && size == 0) {"),
            ("negate", "if (!(offset > limit || size == 0)) {"),
        })

    def test_statements_are_dropped_and_declarations_are_not(self):
        self.assertEqual(changes("  forget(transfer);"), {("drop", "")})
        self.assertEqual(changes("  transfer.stopping = true;"), {("drop", "")})
        self.assertEqual(changes("  const auto id = next_id_++;"), set())
        self.assertEqual(changes("  Transfer& transfer = transfers_[id];"), set())
        self.assertEqual(changes("  return ec;"), set())

    def test_locks_and_wake_ups(self):
        self.assertEqual(changes("  const std::lock_guard lock(mutex_);"), {("lock", "")})
        self.assertEqual(changes("  empty_.notify_all();"), {("wake", "")})

    def test_errors_are_swapped(self):
        self.assertEqual(changes("  return errc::timed_out;"), {("error", "return errc::protocol_violation;")})
        self.assertEqual(changes('    case errc::timed_out: return "the deadline passed";'), set())

    def test_window_arithmetic(self):
        self.assertIn(("one", "return size() - 1;".replace(" - 1", "")), changes("  return size() - 1;"))

    def test_text_is_left_alone(self):
        self.assertEqual(changes('  // a < b || c'), set())
        self.assertEqual(changes('#include <a> // a == b'), set())
        self.assertEqual(changes('      "a < b && c == d",'), set())


if __name__ == "__main__":
    unittest.main()
