"""Reads a cubin with the disassembler of Triton's wheel: registers, spills, and the instructions of its loops."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+ ")
_RESOURCE = re.compile(r"(REG|STACK|LOCAL):(\d+)")
_SPILLS = ("LDL", "STL")


class Loop(NamedTuple):
    """The instructions of one iteration, on the shortest path through the loop.

    The longer paths are rare by construction: the masked last tile, a tile with a new maximum, the two tiles with
    columns of their own form.
    """

    iteration: tuple[str, ...]
    first: int = 0  # where it starts and ends in the listing
    last: int = 0

    def encloses(self, other: Loop) -> bool:
        """Whether ``other`` is an inner loop of this one."""
        return self != other and self.first <= other.first and other.last <= self.last

    def count(self, *prefixes: str) -> int:
        """How many of its instructions start with one of these."""
        return sum(name.startswith(prefixes) for name in self.iteration)


class MachineCode(NamedTuple):
    """Resources and loops of a cubin."""

    registers: int
    stack: int
    spills: int  # instructions that spill, in the whole kernel
    looped_spills: int  # those inside a loop over columns or over a list
    loops: tuple[Loop, ...]

    def main_loops(self) -> tuple[Loop, ...]:
        """The innermost loops that load and compute, without the one that fills rows with a constant."""
        loops = [loop for loop in self.loops if loop.count("LDG") and loop.count("MUFU", "DFMA")]
        return tuple(loop for loop in loops if not any(loop.encloses(other) for other in loops))

    def sweeps(self) -> tuple[Loop, ...]:
        """The innermost loops that load."""
        loops = [loop for loop in self.loops if loop.count("LDG")]
        return tuple(loop for loop in loops if not any(loop.encloses(other) for other in self.loops))


class InstructionLimit(NamedTuple):
    """The most that a kernel may use."""

    registers: int
    stack: int  # bytes
    looped_spills: int  # instructions
    per_column: float | None  # instructions of all main loops; None: no loop over columns, or several kinds of them

    def exceeded(self, code: MachineCode) -> list[str]:
        """A sentence for each resource of ``code`` above its limit."""
        failures = []
        if code.looped_spills > self.looped_spills or code.stack > self.stack:
            found = f"{code.looped_spills} spills in loops, {code.stack} bytes of stack"
            failures.append(f"{found}, limits {self.looped_spills} and {self.stack}")
        if code.registers > self.registers:
            failures.append(f"{code.registers} registers, limit {self.registers}")
        return failures


def read(cubin: bytes, tools: Path) -> MachineCode:
    """Disassemble ``cubin`` with the programs in ``tools``.

    Raises:
        RuntimeError: cuobjdump or nvdisasm fails; the message ends with its output.
    """
    with tempfile.TemporaryDirectory(prefix="caref-cubin-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", path)
        listing = _run(tools / "nvdisasm", "-c", path)
    resources = {name: int(value) for name, value in _RESOURCE.findall(usage)}
    labels, instructions = _parse(listing)
    loops = tuple(_loops(labels, instructions))
    stack = resources["STACK"] + resources["LOCAL"]
    return MachineCode(resources["REG"], stack, *_spills(instructions, loops), loops)


def _run(program: Path, *arguments: object) -> str:
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _parse(listing: str) -> tuple[dict[str, int], list[str]]:
    """Instructions in order, and the index that each label stands before."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
        elif instruction:
            instructions.append(instruction.group(1).strip())
    return labels, instructions


def _spills(instructions: list[str], loops: tuple[Loop, ...]) -> tuple[int, int]:
    """The number of instructions that spill, and of those in a loop over columns or over a list.

    A program that processes several rows has an outer loop over rows, where a spill costs one instruction a row.
    """
    loops = tuple(loop for loop in loops if not _is_of_rows(loop, loops))
    spills = [place for place, instruction in enumerate(instructions) if _name(instruction).startswith(_SPILLS)]
    looped = [place for place in spills if any(loop.first <= place <= loop.last for loop in loops)]
    return len(spills), len(looped)


def _is_of_rows(loop: Loop, loops: tuple[Loop, ...]) -> bool:
    """Whether two loops that load follow one another inside it."""
    inner = [other for other in loops if loop.encloses(other) and other.count("LDG")]
    return any(one.last < other.first for one in inner for other in inner)


def _name(instruction: str) -> str:
    return _PREDICATE.sub("", instruction).split()[0]


def _loops(labels: dict[str, int], instructions: list[str]):
    for index, instruction in enumerate(instructions):
        target = _TARGET.search(instruction)
        if not _name(instruction).startswith("BRA") or target is None:
            continue
        header = labels.get(target.group(1), index)
        if header < index:
            path = _shortest_path(labels, instructions, header, index)
            if path:
                yield Loop(tuple(_name(instructions[place]) for place in path), header, index)


def _shortest_path(labels: dict[str, int], instructions: list[str], first: int, last: int) -> list[int]:
    """The shortest path from ``first`` to ``last`` inclusive; empty if there is none."""
    cost, before, queue = {first: 1}, {}, [(1, first)]
    while queue:
        steps, place = heapq.heappop(queue)
        if place == last:
            path = [place]
            while path[-1] in before:
                path.append(before[path[-1]])
            return path[::-1]
        for following in _followers(labels, instructions, place):
            if first <= following <= last and steps + 1 < cost.get(following, len(instructions) + 1):
                cost[following], before[following] = steps + 1, place
                heapq.heappush(queue, (steps + 1, following))
    return []


def _followers(labels: dict[str, int], instructions: list[str], place: int) -> list[int]:
    instruction = instructions[place]
    name, target = _name(instruction), _TARGET.search(instruction)
    conditional = instruction.startswith("@") or name.startswith("BRA.DIV") or re.search(r"BRA\S* !?U?P\d", instruction)
    if name.startswith("BRA") and target:
        reached = [labels[target.group(1)]]
        return [*reached, place + 1] if conditional else reached
    if name.startswith(("EXIT", "RET", "BRX")):
        return [place + 1] if conditional else []
    return [place + 1]
