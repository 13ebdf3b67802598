#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# clang-tidy, as .clang-tidy says, and cppcheck over the library and its tools. A finding is an error; where one is wrong, a
# NOLINT in its place, or a line here, says why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. scripts/debian_packages.sh
kvferry_ensure_packages lint

# Most of what a file takes are the headers, so several are read at a time; but these checks see nothing in files that others
# include.
cmake --preset lint >/dev/null
run-clang-tidy -quiet -p build/lint -j "$(nproc)" 2>/dev/null
cmake --preset lint -B build/lint-each -DKVFERRY_UNITY_BUILD=OFF >/dev/null
run-clang-tidy -quiet -p build/lint-each -j "$(nproc)" -checks='-*,misc-unused-alias-decls,misc-unused-using-decls' 2>/dev/null

# Each file of its own has all definitions: with KVFERRY_HEADER_ONLY, kvferry's headers have those of core, TCP and shm.
# Not understood by cppcheck 2.10:
# - uninitMemberVar, uninitMemberVarPrivate: lists of members that calls are made in.
# - accessMoved, ignoredReturnValue: requires-expressions, whose operands are never evaluated, and captures of lambdas that
#   are in the arguments of another call.
# - rethrowNoCurrentException: a function that is called where an exception is being handled.
# - passedByValue: that what is given is moved on.
# - virtualCallInConstructor: meant as it is, for the class's own part.
suppressed=(uninitMemberVar uninitMemberVarPrivate accessMoved ignoredReturnValue rethrowNoCurrentException passedByValue virtualCallInConstructor
  missingIncludeSystem)
cppcheck -j "$(nproc)" --quiet --error-exitcode=1 --std=c++20 --language=c++ --enable=warning,performance,portability \
  --inline-suppr "${suppressed[@]/#/--suppress=}" -Iinclude -Ibuild/lint/include -D__linux__ -DKVFERRY_HEADER_ONLY=1 -DKVFERRY_WITH_TLS=1 \
  src/shm.cpp src/auto.cpp src/rdma tools
