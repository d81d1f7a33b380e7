"""The text of a kernel in the assembly of AMD's GPUs as a list of instructions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SCALARS = 512  # registers by number: 256 vectors, 256 that accumulate, then scalars
VCC, EXEC = SCALARS + 106, SCALARS + 126
_NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "exec": (EXEC, 2), "exec_lo": (EXEC, 1)}
_NAMED |= {"exec_hi": (EXEC + 1, 1), "m0": (SCALARS + 124, 1)}
_BANKS = {"v": 0, "a": 256, "s": SCALARS}


@dataclass(frozen=True)
class Instruction:
    """`modifiers` follow the operands, as `offset:16` or `offen`."""

    name: str
    operands: tuple[str, ...]
    modifiers: dict[str, str]
    text: str

    @functools.cached_property
    def base(self) -> str:
        """The name without the encoding."""
        return re.sub(r"_(e32|e64|dpp|sdwa)$", "", self.name)

    @functools.cached_property
    def registers(self) -> frozenset[int]:
        found = (registers(operand) for operand in self.operands)
        return frozenset(first + i for first, count in (each for each in found if each) for i in range(count))

    def only(self, *known: str) -> None:
        """Refuses any other modifier."""
        if unknown := set(self.modifiers).difference(known):
            raise NotImplementedError(f"{', '.join(sorted(unknown))} of {self.text}")

    def number(self, modifier: str, default: int = 0) -> int:
        return int(self.modifiers.get(modifier, str(default)), 0)

    def numbers(self, modifier: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Of `op_sel:[0,1]` for example."""
        given = self.modifiers.get(modifier)
        return tuple(int(each) for each in given.strip("[]").split(",")) if given else default


class Argument(NamedTuple):
    """Where a kernel looks for an argument; hidden ones say by their kind what they are."""

    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Program:
    """`descriptor`: numbers of the kernel descriptor, by their names without `.amdhsa_`."""

    descriptor: dict[str, int]
    arguments: list[Argument]
    labels: dict[str, int]
    code: list[Instruction]
    _compiled: list[Any] = field(default_factory=list)

    def once(self, compile_: Callable[[Instruction], Any]) -> list[Any]:
        """What `compile_` makes of each instruction."""
        if not self._compiled:
            self._compiled.extend(compile_(instruction) for instruction in self.code)
        return self._compiled


@functools.lru_cache(maxsize=65536)
def registers(operand: str) -> tuple[int, int] | None:
    """The first of an operand's registers and how many; None for a constant."""
    operand = re.sub(r"^(-|neg\(|abs\(|sext\()*\|?|[)|]*$", "", operand)
    if operand in _NAMED:
        return _NAMED[operand]
    if not (match := re.match(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])$", operand)):
        return None
    first = int(match[2] or match[3])
    return _BANKS[match[1]] + first, int(match[4] or first) - first + 1


def parse(text: str) -> Program:
    """The one kernel of a module."""
    body = re.search(r"^\w+:\s*; @\w+\n(.*?)^\.Lfunc_end", text, flags=re.MULTILINE | re.DOTALL)
    if body is None:
        raise ValueError("this is no kernel for gfx942")
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for line in body[1].splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.?\w+):$", line):
            labels[label[1]] = len(code)
        elif line and not line.startswith("."):
            code.append(_instruction(line))
    descriptor = {name: int(value) for name, value in re.findall(r"\.amdhsa_(\w+) (\d+)$", text, flags=re.MULTILINE)}
    pattern = r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)"
    arguments = [Argument(kind, int(offset), int(size)) for offset, size, kind in re.findall(pattern, text)]
    return Program(descriptor, arguments, labels, code)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" ")
    if name == "s_waitcnt":
        return Instruction(name, (), dict(re.findall(r"(\w+)\((\d+)\)", rest)), line)
    *words, last = re.split(r",\s*(?![^\[(]*[\])])", rest.strip())
    if last:
        operand, *modifiers = last.split()
        words.append(operand)
    else:
        modifiers = []
    return Instruction(name, tuple(words), dict(each.partition(":")[::2] for each in modifiers), line)
