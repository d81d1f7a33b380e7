"""The text of a kernel in PTX as a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

Operand = str | list[str]  # in braces several


class Instruction(NamedTuple):
    """`parts` of the name: `add.rn.f32` has three, `st.shared::cta.b32` `shared` for its second.

    Under a `guard` only threads whose register of that name is true, or false if `negated`, take part.
    """

    parts: list[str]
    operands: list[Operand]
    guard: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Program:
    """`parameters` in order, `widths` in bits of registers that are declared by name, where labels stand in `code`."""

    parameters: list[str]
    widths: dict[str, int]
    labels: dict[str, int]
    code: list[Instruction]


def parse(text: str) -> Program:
    """The one kernel of a module."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"^\s*\.(loc|file|pragma)\b.*$", "", text, flags=re.MULTILINE)
    entry = re.search(r"\.entry\s+\w+\((.*?)\).*?\{", text, flags=re.DOTALL)
    if entry is None:
        raise ValueError("this is no kernel in PTX")
    parameters = [line.split()[-1] for line in entry[1].split(",") if line.strip()]
    widths: dict[str, int] = {}
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for statement in _in_braces(text[entry.end() :]).split(";"):
        rest = statement.strip()
        while start := re.match(r"([{}])\s*|([$\w]+):\s*", rest):
            if start[2]:
                labels[start[2]] = len(code)
            rest = rest[start.end() :]
        if declared := re.match(r"\.reg\s+\.([a-z]+)(\d*)\s+([^<]*)$", rest):
            widths |= {name.strip(): int(declared[2] or 1) for name in declared[3].split(",")}
        elif rest and not rest.startswith("."):
            code.append(_instruction(rest))
    return Program(parameters, widths, labels, code)


def _in_braces(text: str) -> str:
    """What comes before the brace that closes one before `text`."""
    depth = 1
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[: brace.start()]
    raise ValueError("a brace is not closed")


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)([%\w]+)\s+", text)
    name, *operands = text[guard.end() if guard else 0 :].split(maxsplit=1)
    words = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", "".join(operands))
    parsed: list[Operand] = [
        [each.strip() for each in word[1:-1].split(",")] if word.startswith("{") else re.sub(r"\s+", "", word)
        for word in words
    ]
    parts = [part.split("::")[0] for part in name.split(".")]
    return Instruction(parts, parsed, guard and guard[2], bool(guard and guard[1]), text)
