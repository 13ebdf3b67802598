#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Changes kvferry's sources on purpose, one small fault at a time, and shows which faults the tests don't see.

For each mutant it changes one line in a copy of the tree, builds the test programs that ought to notice, runs them until one
fails, and puts the line back. A mutant that no test fails for has survived: a test is missing, or the line says nothing.

  scripts/mutate.py --files 'src/tcp/lane*.cpp' --count 20      # 20 at random of these files
  scripts/mutate.py --diff main --all                           # each line that differs from main
  scripts/mutate.py --only src/tcp/lane.cpp:117:compare         # one again, as a survivor is named in the table
  scripts/mutate.py --files 'src/core/kit/*.cpp' --list         # what there is, without building

Needs what tests/run.sh has installed. Prints a line a mutant and, last, a table of the survivors; exits 1 if there are any.
"""
import argparse
import dataclasses
import fnmatch
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The programs that ought to see a fault in a folder, the quickest first. With a filter where a part will do.
SUITES = {
    "src/core": ["kvferry_core_tests", "kvferry_tcp_tests", "kvferry_conformance_tests"],
    "src/tcp": ["kvferry_tcp_tests", "kvferry_conformance_tests"],
    "src/rdma": ["kvferry_rdma_tests"],
}

SWAPPED_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
# Statements that may be dropped and leave something that compiles: calls and assignments, alone on their line.
STATEMENT = re.compile(r"^\s+(\(void\))?[A-Za-z_][\w:]*([.\w]|->|\[[^\]]*\]|\([^;{}]*\))*\s*(\(.*\)|[-+|&]?=[^=].*|\+\+|--);\s*(//.*)?$")
NO_STATEMENT = re.compile(r"^\s*(return|throw|using|namespace|case|default|break|continue|goto|delete|else|const|auto|static|std::\w+<|for|if|while|do|switch)\b")
DECLARATION = re.compile(r"^\s*(const\s+)?[A-Za-z_][\w:<>,\s*&]*\s+[a-z_]\w*\s*(=|\(|\{|;)")
LOCK = re.compile(r"^\s*(const\s+)?std::(lock_guard|scoped_lock)\b.*;\s*$")
WAKE = re.compile(r"(notify_one|notify_all|wake|post|arm|set)\(")
OWN_ERROR = re.compile(r"errc::(\w+)")


@dataclasses.dataclass(frozen=True)
class Mutant:
    path: str
    line: int  # from 1
    kind: str
    old: str
    new: str

    @property
    def name(self):
        return f"{self.path}:{self.line}:{self.kind}"

    def change(self):
        return f"{self.old.strip()}  ->  {self.new.strip() or '(nothing)'}"


def code_of(line):
    """The line without strings and comments, of the same length."""
    line = re.sub(r'"(\\.|[^"\\])*"', lambda m: '"' + " " * (len(m[0]) - 2) + '"', line)
    comment = line.find("//")
    return line if comment < 0 else line[:comment] + " " * (len(line) - comment)


def mutants_of_line(path, number, line):
    """All mutants of one line. Replaces one place at a time."""
    code = code_of(line)
    if not code.strip() or code.lstrip().startswith(("#", "///", "static_assert", "template", "using ")):
        return

    def at(match, text, kind, group=0):
        return Mutant(path, number, kind, line, line[: match.start(group)] + text + line[match.end(group) :])

    # Spaces around them: template brackets have none.
    for i, match in enumerate(re.finditer(r" (<=|>=|==|!=|<|>) ", code)):
        yield at(match, SWAPPED_COMPARISONS[match[1]], "compare" + (str(i + 1) if i else ""), 1)
    for i, match in enumerate(re.finditer(r" (&&|\|\|) ", code)):
        yield at(match, "||" if match[1] == "&&" else "&&", "logic" + (str(i + 1) if i else ""), 1)
    for i, match in enumerate(re.finditer(r"(?<=[\w)\]]) ([-+]) 1\b", code)):
        yield at(match, "", "one" + (str(i + 1) if i else ""))
    if match := re.match(r"^\s*(?:\} else )?if \((?!const |auto |Failure )(.*)\) \{\s*$", code):
        if ";" not in match[1]:
            yield at(match, "!(" + line[match.start(1) : match.end(1)] + ")", "negate", 1)
    if match := OWN_ERROR.search(code):
        if "case " not in code:
            other = "protocol_violation" if match[1] != "protocol_violation" else "connection_lost"
            yield at(match, other, "error", 1)
    if LOCK.match(code):
        yield Mutant(path, number, "lock", line, "")
    elif STATEMENT.match(code) and not NO_STATEMENT.match(code) and not DECLARATION.match(code):
        yield Mutant(path, number, "wake" if WAKE.search(code) else "drop", line, "")


def mutants_of_file(path, lines_wanted=None):
    lines = (ROOT / path).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if lines_wanted is None or number in lines_wanted:
            yield from mutants_of_line(path, number, line)


def changed_lines(base):
    """{path: lines that differ from `base`}"""
    diff = subprocess.run(["git", "diff", "-U0", base, "--", "src"], cwd=ROOT, check=True, text=True, capture_output=True).stdout
    found, path = {}, None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = line[6:] if line.startswith("+++ b/") else None
        elif path and (match := re.match(r"@@ .* \+(\d+)(?:,(\d+))? @@", line)):
            first, count = int(match[1]), int(match[2] or 1)
            found.setdefault(path, set()).update(range(first, first + count))
    return found


def tracked(pattern):
    files = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, check=True, text=True, capture_output=True).stdout.split()
    return [f for f in files if fnmatch.fnmatch(f, pattern) and f.endswith((".cpp", ".hpp"))]


class Copy:
    """A tree of its own, so that the checkout is never left changed."""

    def __init__(self, folder, jobs):
        self.folder = folder
        self.jobs = str(jobs)
        self.build_folder = folder / "build" / "mutants"

    def prepare(self, programs):
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
        for name in filter(None, files):
            source, target = ROOT / name, self.folder / name
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
                os.utime(target)  # newer than what was built of an earlier copy
        configure = ["cmake", "-S", str(self.folder), "-B", str(self.build_folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug",
                     "-DCMAKE_CXX_FLAGS_DEBUG=-O1", "-DKVFERRY_BUILD_BENCHMARKS=OFF", "-DKVFERRY_WARNINGS_AS_ERRORS=OFF"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        if self.build(programs):
            raise SystemExit("mutate.py: the tree does not build without any change")
        for program in programs:
            if (outcome := self.run(program, 600)) != "passed":
                raise SystemExit(f"mutate.py: {program} {outcome} without any change")

    def write(self, mutant, text):
        path = self.folder / mutant.path
        lines = path.read_text().splitlines(keepends=True)
        ending = "\n" if text and not text.endswith("\n") else ""
        lines[mutant.line - 1] = (text + ending) or "\n"
        path.write_text("".join(lines))

    def build(self, programs):
        return subprocess.run(["cmake", "--build", str(self.build_folder), "--parallel", self.jobs, "--target", *programs],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode

    def run(self, program, seconds):
        """"passed", "failed" or "hung"."""
        command = [str(self.build_folder / "tests" / program), "--gtest_fail_fast", "--gtest_brief=1"]
        process = subprocess.Popen(command, cwd=self.build_folder / "tests", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            return "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "hung"
        finally:
            # Also what the program has started.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def programs_for(path):
    return next((programs for folder, programs in SUITES.items() if path.startswith(folder + "/")), [])


def try_mutant(copy, mutant, seconds):
    """(outcome, the program that saw it)"""
    programs = programs_for(mutant.path)
    copy.write(mutant, mutant.new)
    try:
        if copy.build(programs):
            return "does not compile", ""
        for program in programs:
            if (outcome := copy.run(program, seconds)) != "passed":
                return outcome, program
        return "SURVIVED", ""
    finally:
        copy.write(mutant, mutant.old)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--files", action="append", metavar="PATTERN", help="of these files of src/; may be given several times")
    what.add_argument("--diff", metavar="REVISION", help="of the lines of src/ that differ from a revision")
    what.add_argument("--only", action="append", metavar="FILE:LINE:KIND", help="these")
    parser.add_argument("--count", type=int, default=20, help="how many, drawn at random (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="all instead of --count")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="only print them")
    parser.add_argument("--seconds", type=float, default=180, help="after which a program hangs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="of the compiler")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "build" / "mutate",
                        help="where the copy is made and built (default: build/mutate)")
    return parser.parse_args()


def wanted_mutants(arguments):
    if arguments.diff:
        found = [m for path, lines in changed_lines(arguments.diff).items() for m in mutants_of_file(path, lines)]
    elif arguments.files:
        paths = sorted({path for pattern in arguments.files for path in tracked(pattern)})
        found = [m for path in paths for m in mutants_of_file(path)]
    else:
        paths = {name.split(":")[0] for name in arguments.only}
        by_name = {m.name: m for path in paths for m in mutants_of_file(path)}
        if missing := [name for name in arguments.only if name not in by_name]:
            raise SystemExit(f"mutate.py: no such mutant: {', '.join(missing)}; --list shows those there are")
        return [by_name[name] for name in arguments.only]
    found = [m for m in found if programs_for(m.path)]
    if arguments.all or len(found) <= arguments.count:
        return found
    return sorted(random.Random(arguments.seed).sample(found, arguments.count), key=lambda m: (m.path, m.line, m.kind))


def main():
    arguments = parse_arguments()
    mutants = wanted_mutants(arguments)
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name}  {mutant.change()}")
        return 0
    if not mutants:
        raise SystemExit("mutate.py: nothing to change there")
    copy = Copy(arguments.folder.resolve(), arguments.jobs)
    copy.prepare(sorted({program for m in mutants for program in programs_for(m.path)}))

    outcomes = {}
    for i, mutant in enumerate(mutants, 1):
        begun = time.monotonic()
        outcome, program = try_mutant(copy, mutant, arguments.seconds)
        outcomes[mutant] = outcome
        seen = f"{outcome} ({program})" if program else outcome
        print(f"{i}/{len(mutants)} {mutant.name}  {mutant.change()}: {seen}, {time.monotonic() - begun:.0f} s", flush=True)

    survivors = [m for m, outcome in outcomes.items() if outcome == "SURVIVED"]
    unbuilt = sum(outcome == "does not compile" for outcome in outcomes.values())
    print(f"\n{len(mutants)} mutants, {unbuilt} that don't compile, {len(mutants) - unbuilt - len(survivors)} killed, "
          f"{len(survivors)} survived")
    for mutant in survivors:
        print(f"  {mutant.name}  {mutant.change()}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
