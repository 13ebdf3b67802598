# SPDX-License-Identifier: Apache-2.0
"""Tests of what mutate.py changes; run by ctest."""
import unittest

import mutants


def changes(line):
    return {(m.kind, m.new.strip()) for m in mutants.mutants_of_line("src/tcp/x.cpp", 1, line + "\n")}


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


def written(text, line=1):
    """The text in which all mutants of one of its lines can be chosen, and those that can't."""
    found = list(mutants.mutants_of_line("src/tcp/x.cpp", line, text.splitlines(keepends=True)[line - 1]))
    return mutants.choosable(text, {mutant: number for number, mutant in enumerate(found, 1)})


class Choosing(unittest.TestCase):
    def test_of_conditions(self):
        text, left_out = written("  if (a < b) {\n  }\n")
        self.assertEqual(text, "  if (MUTANT(2) ? bool(!(a < b)) : MUTANT(1) ? bool(a <= b) : bool(a < b)) {\n  }\n")
        self.assertEqual(left_out, [])
        text, _ = written("  for (int i = 0; i < n; ++i) {\n")
        self.assertEqual(text, "  for (int i = 0; MUTANT(1) ? bool(i <= n) : bool(i < n); ++i) {\n")

    def test_of_statements(self):
        self.assertEqual(written("  forget(a);\n")[0], "if (MUTANT(1)) {  } else { forget(a); }\n")
        self.assertEqual(written("  return a - 1;\n")[0], "if (MUTANT(1)) { return a; } else { return a - 1; }\n")

    def test_of_declarations(self):
        self.assertEqual(written("  const bool full = a >= b;\n")[0],
                         "  const bool full = MUTANT(1) ? (a > b) : (a >= b);\n")
        text = "  const auto [a, b] = split(c - 1);\n"
        self.assertEqual(written(text)[0], text)
        self.assertEqual(len(written(text)[1]), 1)

    def test_of_locks(self):
        self.assertEqual(written("  const std::lock_guard lock(mutex_);\n")[0],
                         "  std::unique_lock lock(mutex_, std::defer_lock); if (!MUTANT(1)) { lock.lock(); }\n")

    def test_of_lines_in_the_middle_of_something(self):
        text, left_out = written("  return a ||\n         b < c;  // why\n  next();\n", 2)
        self.assertEqual(text, "if (MUTANT(1)) { return a || b <= c; } else { return a || b < c; }\n\n  next();\n")
        self.assertEqual(left_out, [])
        # To drop such a line would leave half a statement.
        text = "  throw Error(a,\n              text(b));\n"
        self.assertEqual(written(text, 2)[0], text)

    def test_lines_stay_where_they_are(self):
        text = "  if (a &&\n      b == c) {\n    d();\n  }\n"
        self.assertEqual(written(text, 2)[0].count("\n"), text.count("\n"))


if __name__ == "__main__":
    unittest.main()
