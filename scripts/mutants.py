# SPDX-License-Identifier: Apache-2.0
"""What mutate.py changes: the mutants of a line, and how a source is written so that a program can choose one at run time."""
import dataclasses
import re

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


def mutants_of_text(path, text, lines_wanted=None):
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if lines_wanted is None or number in lines_wanted:
            yield from mutants_of_line(path, number, line)


# How a program chooses: MUTANT(n) is true for the one whose number the environment names. Which ones a program comes by is
# noted in a file of a byte for each, at once, so that it is known of programs, too, that crash.
HEADER = """\
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>

namespace mutants {
inline const unsigned chosen = std::getenv("KVFERRY_MUTANT") ? unsigned(std::atol(std::getenv("KVFERRY_MUTANT"))) : 0;
inline unsigned char* map_reached() {
  const char* const path = std::getenv("KVFERRY_MUTANTS_REACHED");
  if (path == nullptr) return nullptr;
  const int file = ::open(path, O_RDWR | O_CLOEXEC);
  struct stat status = {};
  ::fstat(file, &status);
  void* const bytes = ::mmap(nullptr, size_t(status.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  ::close(file);
  return bytes == MAP_FAILED ? nullptr : static_cast<unsigned char*>(bytes);
}
inline unsigned char* const reached = map_reached();
inline bool on(unsigned number) {
  if (reached != nullptr) __atomic_store_n(&reached[number], 1, __ATOMIC_RELAXED);
  return number == chosen;
}
}  // namespace mutants
#define MUTANT(number) (::mutants::on(number))
"""

CONDITION = re.compile(r"^(\s*(?:\} else )?(?:if|while) \((?:[^;]*; )?)(?!const |auto )([^;]*)(\) \{\s*)$")
LOOP = re.compile(r"^(\s*for \([^;]*; )([^;]+)(; [^;]*\) \{\s*)$")
ONE_LINE_FUNCTION = re.compile(r"^(.*\) (?:const |noexcept |override )*\{ return )([^;]*)(; \}\s*)$")
INITIALISED = re.compile(r"^(\s*(?:const |static )*[A-Za-z_][\w:<>,\s*&]*?[\s&*][a-z_]\w* = )(?!\{)(.*)(;\s*)$")
STRUCTURED_BINDING = re.compile(r"^\s*(const )?auto&?&? \[")
NO_DECLARATION = re.compile(r"^\s*(return|throw|delete|co_return)\b")
LABEL = re.compile(r"^(\s*(?:case [\w:]+|default): )(.*)$")
LOCKED = re.compile(r"^(\s*)const std::(?:lock_guard|scoped_lock) (\w+)\(([^,]+)\);\s*$")


def is_balanced(code):
    depth = 0
    for character in code:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def statement_at(lines, number):
    """(first, last): the lines, from 1, of the statement, or of what comes before a block, at line `number`; or None."""
    def code(n):
        return code_of(lines[n - 1]).strip()

    first = number
    while first > 1:
        before = code(first - 1)
        if not before or before.startswith("#"):
            break
        if before.endswith((";", "{", "}")) or re.search(r"^(case [\w:]+|default|public|private|protected)( \w+)?:$", before):
            break
        first -= 1
        if number - first > 12:
            return None
    last = first
    while not code(last).endswith((";", "{", "}")):
        last += 1
        if last > len(lines) or last - first > 16:
            return None
    return (first, last) if first <= number <= last else None


def choosable(text, numbered):
    """`text`, which any of the mutants in `numbered`, {mutant: number}, becomes if it is chosen; and those it can't become.

    Lines stay where they are. What doesn't compile as it is written here can only be tried alone."""
    lines = text.splitlines(keepends=True)
    statements, left_out = {}, []
    for mutant in numbered:
        place = statement_at(lines, mutant.line)
        if place is None or (mutant.new == "" and place[0] != place[1]):
            left_out.append(mutant)
        else:
            statements.setdefault(place, []).append(mutant)
    for (first, last), mutants in statements.items():
        original = [line.rstrip("\n") for line in lines[first - 1 : last]]
        choices = []
        for mutant in mutants:
            changed = list(original)
            changed[mutant.line - first] = mutant.new.rstrip("\n")
            choices.append((numbered[mutant], mutant.kind, joined_statement(changed)))
        written = choice(joined_statement(original), choices)
        if written is None:
            left_out += mutants
        else:
            lines[first - 1 : last] = [written + "\n"] + ["\n"] * (last - first)
    return "".join(lines), left_out


def joined_statement(lines):
    """One line, without comments."""
    code = [line[: len(code_of(line).rstrip())] for line in lines]
    return code[0] + "".join(" " + line.strip() for line in code[1:])


def choice(old, choices):
    """A statement that is one of the choices, [(number, kind, text)], or else the old one; None where that can't be written."""
    code = code_of(old)
    if "constexpr" in code:
        return None
    if label := LABEL.match(code):
        length = label.end(1)
        rest = choice("  " + old[length:], [(n, kind, "  " + text[length:]) for n, kind, text in choices])
        return rest and old[:length] + rest
    if any(kind == "lock" for _, kind, _ in choices):
        locked = LOCKED.match(code)
        if not locked:
            return None
        return f"{locked[1]}std::unique_lock {locked[2]}({locked[3]}, std::defer_lock); if (!MUTANT({choices[0][0]})) {{ {locked[2]}.lock(); }}"
    for pattern, cast in ((CONDITION, "bool"), (LOOP, "bool"), (ONE_LINE_FUNCTION, ""), (INITIALISED, "")):
        match = pattern.match(code)
        if pattern is INITIALISED and NO_DECLARATION.match(code):
            continue
        if not match or not is_balanced(match[2]):
            continue
        head, tail = old[: match.start(2)], old[match.end(2) :]
        expression = f"{cast}({old[match.start(2) : match.end(2)]})"
        for number, _, text in choices:
            if not (text.startswith(head) and text.endswith(tail)):
                return None
            expression = f"MUTANT({number}) ? {cast}({text[len(head) : len(text) - len(tail)]}) : {expression}"
        return head + expression + tail
    if not code.rstrip().endswith(";") or not is_balanced(code) or code.lstrip().startswith("}"):
        return None
    if (DECLARATION.match(code) or STRUCTURED_BINDING.match(code)) and not NO_DECLARATION.match(code):
        return None
    return "".join(f"if (MUTANT({number})) {{ {text.strip()} }} else " for number, _, text in choices) + "{ " + old.strip() + " }"


