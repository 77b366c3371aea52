"""From rules about system calls to a program for seccomp(2), in classic BPF.

A rule here is numbers only; names and profiles are `microguest.seccomp`'s. The program finds a
call by bisection, so that its length hardly matters, and looks at arguments last.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["AUDIT", "INSTRUCTIONS", "Condition", "Rules", "TooLong", "assemble"]

INSTRUCTIONS: Final = 4096  # BPF_MAXINSNS of linux/bpf_common.h
# AUDIT_ARCH_* of linux/audit.h, both little-endian; in the order of NUMBERS' columns.
AUDIT: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32: Final = 0x40000000  # __X32_SYSCALL_BIT: x32's calls have the same architecture

# linux/bpf_common.h: class, size or operation, and source or mode together
LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS: a word of struct seccomp_data
AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
JUMP: Final = 0x05  # BPF_JMP | BPF_JA
EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
GREATER: Final = 0x25  # BPF_JMP | BPF_JGT | BPF_K
AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
RETURN: Final = 0x06  # BPF_RET | BPF_K
# struct seccomp_data of linux/seccomp.h
OFFSET_NUMBER: Final = 0
OFFSET_ARCH: Final = 4
OFFSET_ARGUMENTS: Final = 16
WORD: Final = 0xFFFFFFFF
NEAR: Final = 255  # instructions that a conditional jump can pass over

Instruction = tuple[int, int, int, int]  # code, jt, jf, k
Code = list[Instruction]


class TooLong(ValueError):
    """The program would have more instructions than the kernel takes."""


@dataclass(frozen=True, slots=True)
class Condition:
    """On argument `index`, an unsigned 64-bit number: `(argument & mask) OPERATION value`.

    operation: "==", "!=", ">", ">=", "<" or "<=".
    """

    index: int
    operation: str
    value: int
    mask: int = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of one call: the first choice whose conditions all hold, else `otherwise`.

    Answers are what seccomp(2) calls return values.
    """

    otherwise: int
    choices: tuple[tuple[tuple[Condition, ...], int], ...] = ()


def assemble(calls: Mapping[int, Rules], otherwise: int, foreign: int, arch: str) -> bytes:
    """The program. `calls`: by number; `otherwise` is for all others, `foreign` for the calls of
    other architectures than `arch` (a key of AUDIT). Raises TooLong.
    """
    searched = search(list(spans(calls, otherwise)))
    code: Code = [
        (LOAD, 0, 0, OFFSET_ARCH),
        (EQUAL, 1, 0, AUDIT[arch]),
        (RETURN, 0, 0, foreign),
        (LOAD, 0, 0, OFFSET_NUMBER),
    ]
    if arch == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, foreign)]
    code += searched
    if len(code) > INSTRUCTIONS:
        raise TooLong(f"{len(code)} instructions, and the kernel takes {INSTRUCTIONS}")
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def spans(calls: Mapping[int, Rules], otherwise: int) -> Iterable[tuple[int, Rules]]:
    """Numbers from which on other rules hold, in order, from 0."""
    default = Rules(otherwise)
    now = None
    edges = sorted({0, *calls, *(number + 1 for number in calls)})
    for number in edges:
        rules = calls.get(number, default)
        if rules != now:
            yield number, rules
        now = rules


def search(found: list[tuple[int, Rules]]) -> Code:
    """Bisect: the call's number is loaded, and is in one of these spans."""
    if len(found) == 1:
        return decide(found[0][1])
    middle = len(found) // 2
    lower, upper = search(found[:middle]), search(found[middle:])
    edge = found[middle][0]
    if len(lower) <= NEAR:
        return [(AT_LEAST, len(lower), 0, edge), *lower, *upper]
    return [(AT_LEAST, 0, 1, edge), (JUMP, 0, 0, len(lower)), *lower, *upper]


def decide(rules: Rules) -> Code:
    """The answer to one call. The accumulator is free."""
    code: Code = []
    for conditions, answer in rules.choices:
        code += choice(conditions, answer)
    return [*code, (RETURN, 0, 0, rules.otherwise)]


def choice(conditions: tuple[Condition, ...], answer: int) -> Code:
    """The answer, or over it where one of the conditions does not hold."""
    code: Code = [(RETURN, 0, 0, answer)]
    for condition in reversed(conditions):
        code = [*test(condition, len(code)), *code]
    return code


def test(condition: Condition, rest: int) -> Code:
    """Go on behind it where it holds, and where not over the `rest` too."""
    # Two words are compared, the upper one first: what to do if so, and if not; "next" goes on.
    upper, lower = {
        "==": ([(EQUAL, "next", "no")], (EQUAL, "yes", "no")),
        "!=": ([(EQUAL, "next", "yes")], (EQUAL, "no", "yes")),
        ">": ([(GREATER, "yes", "next"), (EQUAL, "next", "no")], (GREATER, "yes", "no")),
        ">=": ([(GREATER, "yes", "next"), (EQUAL, "next", "no")], (AT_LEAST, "yes", "no")),
        "<": ([(GREATER, "no", "next"), (EQUAL, "next", "yes")], (AT_LEAST, "no", "yes")),
        "<=": ([(GREATER, "no", "next"), (EQUAL, "next", "yes")], (GREATER, "no", "yes")),
    }[condition.operation]
    offset = OFFSET_ARGUMENTS + 8 * condition.index  # little-endian
    steps: list[tuple[int, str, str, int]] = []
    for part, shift, comparisons in ((4, 32, upper), (0, 0, [lower])):
        steps.append((LOAD, "", "", offset + part))
        mask = condition.mask >> shift & WORD
        if mask != WORD:
            steps.append((AND, "", "", mask))
        value = condition.value >> shift & WORD
        steps += [(kind, so, not_so, value) for kind, so, not_so in comparisons]
    code: Code = []
    for left, (kind, so, not_so, value) in enumerate(reversed(steps)):  # instructions behind it
        distance = {"": 0, "next": 0, "yes": left, "no": left + rest}
        code.insert(0, (kind, distance[so], distance[not_so], value))
    return code
