#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Changes kvferry's sources on purpose, one small fault at a time, and shows which faults the tests don't see.

All mutants of the files are built at once, into a copy of the tree: at each changed place a program asks the environment
which mutant it is to be. Each test is run once to see which mutants it comes by. Then, for each mutant that is drawn, the
tests that come by it run until one fails. A mutant that none fails for has survived: a test is missing, or the line says
nothing.

  scripts/mutate.py --files 'include/kvferry/tcp/*' --count 60             # 60 at random of these files
  scripts/mutate.py --diff main --all                          # each line that differs from main
  scripts/mutate.py --only include/kvferry/tcp/lane-inl.hpp:117:compare        # one again, as it is named in the table
  scripts/mutate.py --files 'include/kvferry/kit/*' --list            # what there is, without building

What needs an RDMA device is built here and run in a virtual machine, with one boot for all of it:

  scripts/mutate.py --files 'src/rdma/*' --programs kvferry_rdma_device_tests --build-only
  tests/soft_roce/run.sh --vm --timeout 3000 --writable build/mutate -- scripts/mutate.py --run-only --count 15

Needs what tests/run.sh has installed. Prints a line a mutant, writes them as a table to mutants.tsv in its folder (file, line,
kind, change, outcome, test), and ends with those that survived; exits 1 if there are any.
"""
import argparse
import concurrent.futures
import dataclasses
import fnmatch
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import mutants
from mutants import Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The programs that ought to see a fault in a folder, the quickest first, and the part of them that will do. The first folder counts
# that a file is in.
SUITES = {
    "include/kvferry/shm": ["kvferry_shm_tests"],
    "include/kvferry/auto": ["kvferry_auto_tests"],
    "include/kvferry/tcp": ["kvferry_tcp_tests", "kvferry_conformance_tests"],
    "include/kvferry": ["kvferry_core_tests", "kvferry_tcp_tests", "kvferry_conformance_tests"],
    "src/rdma": ["kvferry_rdma_tests"],
}
SOURCES = ["src", "include/kvferry", ":!include/kvferry/testing"]
FILTERS = {"kvferry_conformance_tests": "Tcp/*/OneLane.*", "kvferry_rdma_conformance_tests": "Rdma/*/OneRail.*"}


def changed_lines(base):
    """{path: lines that differ from `base`}"""
    diff = subprocess.run(["git", "diff", "-U0", base, "--", *SOURCES], cwd=ROOT, check=True, text=True, capture_output=True).stdout
    found, path = {}, None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = line[6:] if line.startswith("+++ b/") else None
        elif path and (match := re.match(r"@@ .* \+(\d+)(?:,(\d+))? @@", line)):
            first, count = int(match[1]), int(match[2] or 1)
            found.setdefault(path, set()).update(range(first, first + count))
    return found


def tracked(pattern):
    files = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, check=True, text=True, capture_output=True).stdout.split()
    return [f for f in files if fnmatch.fnmatch(f, pattern) and f.endswith((".cpp", ".hpp"))]


class Copy:
    """A tree of its own, with all mutants in it, so that the checkout is never left changed."""

    def __init__(self, folder):
        self.folder = folder
        self.build_folder = folder / "build"
        self.left_out = []  # mutants that can't be chosen at run time

    def write(self, numbered):
        """Copies the tree, with the mutants of {mutant: number}."""
        by_path = {}
        for mutant, number in numbered.items():
            by_path.setdefault(mutant.path, {})[mutant] = number
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
        self.left_out = []
        for name in filter(None, files):
            source, target = ROOT / name, self.folder / "tree" / name
            if not source.is_file():
                continue
            content = source.read_bytes()
            if name in by_path:
                text, left_out = mutants.choosable(content.decode(), by_path[name])
                content = text.encode()
                self.left_out += left_out
            put(target, content)
            shutil.copymode(source, target)
        put(self.folder / "mutants.hpp", mutants.HEADER.encode())

    def configure(self):
        options = {
            "CMAKE_BUILD_TYPE": "Debug",
            "CMAKE_CXX_FLAGS_DEBUG": f"-O0 -include {self.folder / 'mutants.hpp'}",
            "CMAKE_EXE_LINKER_FLAGS": "-fuse-ld=mold" if shutil.which("mold") else "",
            "KVFERRY_BUILD_BENCHMARKS": "OFF",
            "KVFERRY_WARNINGS_AS_ERRORS": "OFF",
            "KVFERRY_UNITY_BUILD": "ON",
        }
        subprocess.run(["cmake", "-S", str(self.folder / "tree"), "-B", str(self.build_folder), "-G", "Ninja",
                        *(f"-D{name}={value}" for name, value in options.items())], check=True, stdout=subprocess.DEVNULL)

    def build(self, programs, jobs):
        """Nothing, or the compiler's errors as {(path, line)}, of mutated lines or of others."""
        built = subprocess.run(["cmake", "--build", str(self.build_folder), "--parallel", str(jobs), "--target", *programs, "--", "-k", "0"],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        # An error in MUTANT itself is followed by the place where it was written.
        place = r"^(?:\S*/)?tree/(\S+?):(\d+):\d+: "
        errors = place + "error|" + r"^\S*mutants\.hpp:\d+:\d+: error.*(?:\n.*){2}\n" + place + "note: in expansion"
        wrong = {(m[1] or m[3], int(m[2] or m[4])) for m in re.finditer(errors, built.stdout, re.MULTILINE)}
        if built.returncode and not wrong:
            raise SystemExit(built.stdout[-5000:] + "\nmutate.py: the tree does not build")
        return wrong if built.returncode else set()


def put(path, content):
    if not (path.is_file() and path.read_bytes() == content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(copy, numbered, programs, jobs):
    """Builds the programs, and returns those of `numbered` that are in them; the others can't be chosen, or don't compile."""
    known = copy.folder / "not_built.json"  # of earlier builds
    left_out = {Mutant(**mutant) for mutant in json.loads(known.read_text())} if known.exists() else set()
    copy.write({mutant: number for mutant, number in numbered.items() if mutant not in left_out})
    copy.configure()
    left_out |= set(copy.left_out)
    while True:
        numbered = {mutant: number for mutant, number in numbered.items() if mutant not in left_out}
        copy.write(numbered)
        wrong = copy.build(programs, jobs)
        if not wrong:
            return numbered
        # A statement of several lines is written into its first.
        before = len(left_out)
        for mutant in numbered:
            lines = (ROOT / mutant.path).read_text().splitlines(keepends=True)
            first, last = mutants.statement_at(lines, mutant.line)
            if any((mutant.path, line) in wrong for line in range(first, last + 1)):
                left_out.add(mutant)
        if len(left_out) == before:
            raise SystemExit(f"mutate.py: the tree does not build: {wrong}")
        print(f"{len(left_out) - before} mutants do not compile", flush=True)
        known.write_text(json.dumps([dataclasses.asdict(mutant) for mutant in left_out]))


@dataclasses.dataclass(frozen=True)
class Test:
    program: str
    name: str
    seconds: float
    reached: frozenset  # numbers of mutants


class Runner:
    def __init__(self, build_folder, count, factor):
        self.tests_folder = build_folder / "tests"
        self.count = count  # the highest number of a mutant
        self.factor = factor  # of what a test may take

    def names(self, program):
        listed = subprocess.run([str(self.tests_folder / program), "--gtest_list_tests", "--gtest_filter=" + FILTERS.get(program, "*")],
                                check=True, text=True, capture_output=True).stdout
        suite, found = "", []
        for line in listed.splitlines():
            line = line.split("  # ")[0]
            if line.startswith("  "):
                found.append(suite + line.strip())
            elif line.endswith("."):
                suite = line.strip()
        return [name for name in found if "DISABLED_" not in name]

    def run(self, program, names, seconds, mutant=0, reached=None):
        """("passed", "") or ("failed" or "hung", the test)"""
        environment = dict(os.environ, KVFERRY_MUTANT=str(mutant), KVFERRY_TEST_SECONDS=str(max(10, int(seconds))))
        if reached:
            environment["KVFERRY_MUTANTS_REACHED"] = reached
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            command = [str(self.tests_folder / program), "--gtest_fail_fast", "--gtest_filter=" + ":".join(names)]
            process = subprocess.Popen(command, cwd=self.tests_folder, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True, env=environment)
            try:
                outcome = "passed" if process.wait(seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "hung"
            finally:
                # Also what the program has started.
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            output.seek(0)
            begun = re.findall(r"^\[ RUN      \] (.*)$|^\[  FAILED  \] ([^ ,\n]+)", output.read(), re.MULTILINE)
        if outcome == "passed":
            return outcome, ""
        failed = next((failed for _, failed in begun if failed in names), None)
        return outcome, failed or next((run for run, _ in reversed(begun) if run), "")

    def record(self, program, name):
        """The test, with the mutants that it comes by; None if it fails without any."""
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(self.count + 1)
            begun = time.monotonic()
            outcome, _ = self.run(program, [name], 60 * self.factor, reached=file.name)
            reached = frozenset(number for number, byte in enumerate(pathlib.Path(file.name).read_bytes()) if byte)
        return Test(program, name, time.monotonic() - begun, reached) if outcome == "passed" else None

    def try_mutant(self, number, tests, limit):
        """(outcome, the test that saw it)"""
        at_times = None
        for program in dict.fromkeys(test.program for test in tests):
            # The quick ones first, and no more than there is time for.
            wanted, total = [], 0
            for test in sorted((t for t in tests if t.program == program and number in t.reached), key=lambda t: t.seconds):
                if total + test.seconds <= limit or not wanted:
                    wanted.append(test)
                    total += test.seconds
            for part in split(wanted, lambda test: test.seconds < 0.5):
                while part:
                    seconds = (15 + 3 * sum(test.seconds for test in part)) * self.factor
                    outcome, name = self.run(program, [test.name for test in part], seconds, number)
                    if outcome == "passed":
                        break
                    seen_by = f"{program}: {name}"
                    if outcome == "hung" or self.run(program, [name], 60 * self.factor, number)[0] != "passed":
                        return "hung" if outcome == "hung" else "killed", seen_by
                    at_times = seen_by
                    part = [test for test in part if test.name != name]
        if at_times:
            return "killed at times", at_times
        return "SURVIVED", "" if any(number in test.reached for test in tests) else "no test comes by it"


def split(items, first):
    return [part for part in ([i for i in items if first(i)], [i for i in items if not first(i)]) if part]


def programs_for(path):
    return next((programs for folder, programs in SUITES.items() if path.startswith(folder + "/")), [])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="append", metavar="PATTERN", help="of these files of the library; may be given several times")
    parser.add_argument("--diff", metavar="REVISION", help="of the lines of the library that differ from a revision")
    parser.add_argument("--only", action="append", metavar="FILE:LINE:KIND", help="these, whatever else is built")
    parser.add_argument("--count", type=int, default=20, help="how many, drawn at random (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="all instead of --count")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="only print them")
    parser.add_argument("--programs", nargs="+", metavar="PROGRAM", help="the tests to run; by default those for the folder")
    parser.add_argument("--seconds", type=float, default=60, help="what a program's tests may take for a mutant (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="of the compiler, and mutants tried at once")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "build" / "mutate",
                        help="where the copy is made and built (default: build/mutate)")
    parser.add_argument("--build-only", action="store_true", help="run nothing")
    parser.add_argument("--run-only", action="store_true", help="run what was built before")
    arguments = parser.parse_args()
    if not (arguments.files or arguments.diff or arguments.only or arguments.run_only):
        parser.error("one of --files, --diff and --only is needed")
    return arguments


def found_mutants(arguments):
    """All that are built."""
    if arguments.diff:
        lines_of = changed_lines(arguments.diff)
    else:
        patterns = arguments.files or [name.split(":")[0] for name in arguments.only]
        lines_of = {path: None for pattern in patterns for path in tracked(pattern)}
    return [mutant for path, lines in sorted(lines_of.items()) if programs_for(path)
            for mutant in mutants.mutants_of_text(path, (ROOT / path).read_text(), lines)]


def drawn_mutants(arguments, found):
    """Those of `found` that are tried."""
    if arguments.files:
        found = [mutant for mutant in found if any(fnmatch.fnmatch(mutant.path, pattern) for pattern in arguments.files)]
    if arguments.only:
        by_name = {mutant.name: mutant for mutant in found}
        if missing := [name for name in arguments.only if name not in by_name]:
            raise SystemExit(f"mutate.py: no such mutant: {', '.join(missing)}; --list shows those there are")
        return [by_name[name] for name in arguments.only]
    if arguments.all or len(found) <= arguments.count:
        return found
    return sorted(random.Random(arguments.seed).sample(found, arguments.count), key=lambda m: (m.path, m.line, m.kind))


def record_tests(runner, programs, jobs):
    names = [(program, name) for program in programs for name in runner.names(program)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        recorded = list(pool.map(lambda pair: runner.record(*pair), names))
    for pair, test in zip(names, recorded):
        if test is None:
            print(f"left out, because it fails without any mutant: {' '.join(pair)}", flush=True)
    return [test for test in recorded if test]


def try_mutants(arguments, runner, numbers, drawn, tests):
    """{mutant: (outcome, test)}; writes the table."""
    outcomes = {}
    lock = threading.Lock()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool, open(arguments.folder / "mutants.tsv", "w") as table:
        table.write("file\tline\tkind\tchange\toutcome\ttest\n")

        def attempt(mutant):
            begun = time.monotonic()
            wanted = arguments.programs or programs_for(mutant.path)
            outcome, seen_by = runner.try_mutant(numbers[mutant], [t for t in tests if t.program in wanted], arguments.seconds)
            with lock:
                outcomes[mutant] = outcome, seen_by
                print(f"{len(outcomes)}/{len(drawn)} {mutant.name}  {mutant.change()}: {outcome} {seen_by}, "
                      f"{time.monotonic() - begun:.0f} s", flush=True)
                change = mutant.change().replace("\t", " ")
                table.write("\t".join([mutant.path, str(mutant.line), mutant.kind, change, outcome, seen_by]) + "\n")
                table.flush()

        list(pool.map(attempt, drawn))
    return outcomes


def main():
    arguments = parse_arguments()
    arguments.folder = arguments.folder.resolve()
    plan = arguments.folder / "plan.json"
    if arguments.run_only:
        numbers = {Mutant(**mutant): number for mutant, number in json.loads(plan.read_text())}
    else:
        found = found_mutants(arguments)
        if not found:
            raise SystemExit("mutate.py: nothing to change there")
        if arguments.list:
            for mutant in found:
                print(f"{mutant.name}  {mutant.change()}")
            return 0
        numbers = {mutant: number for number, mutant in enumerate(found, 1)}
    programs = arguments.programs or list(dict.fromkeys(program for mutant in numbers for program in programs_for(mutant.path)))
    if not arguments.run_only:
        found = len(numbers)
        numbers = build(Copy(arguments.folder), numbers, programs, arguments.jobs)
        plan.write_text(json.dumps([(dataclasses.asdict(mutant), number) for mutant, number in numbers.items()]))
        print(f"built with {len(numbers)} mutants; {found - len(numbers)} more can't be chosen or don't compile", flush=True)
        if arguments.build_only:
            return 0
    drawn = drawn_mutants(arguments, list(numbers))
    runner = Runner((arguments.folder / "build").resolve(), max(numbers.values()), float(os.environ.get("KVFERRY_TEST_TIME_FACTOR", "1")))
    tests = record_tests(runner, programs, arguments.jobs)
    print(f"{len(tests)} tests", flush=True)
    outcomes = try_mutants(arguments, runner, numbers, drawn, tests)
    survivors = [mutant for mutant in drawn if outcomes[mutant][0] == "SURVIVED"]
    at_times = sum(outcome == "killed at times" for outcome, _ in outcomes.values())
    print(f"\n{len(drawn)} mutants, {len(drawn) - len(survivors)} killed, {at_times} of them not each time, {len(survivors)} survived")
    for mutant in survivors:
        print(f"  {mutant.name}  {mutant.change()}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
