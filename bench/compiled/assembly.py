"""Read machine code as text: what its instructions do, and its innermost loop that works.

NVIDIA's SASS comes from `nvdisasm -c`, AMD's amdgcn from the compiler. Loops are those of the flow graph, an edge back
to a block that every way to it passes, so that code moved out of line is not taken for one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

CLASSES = ("tensor core", "fp", "integer", "load", "store", "shared", "move", "control", "barrier", "other")


class Instruction(NamedTuple):
    """One line of code. `ends` says that the next line is reached, if at all, by a jump."""

    opcode: str  # with its modifiers: "LDG.E.128", "v_mfma_f32_16x16x16_bf16"
    kind: str  # of CLASSES
    label: str | None = None  # where it may jump to
    ends: bool = False


class Block(NamedTuple):
    """A label, if any, and the lines up to the next label or jump."""

    label: str | None
    lines: list[Instruction]


class Loop(NamedTuple):
    """How many instructions of each class, in CLASSES' order and where there are any, one turn has."""

    counts: dict[str, int]
    whole: bool = False  # there is no loop, and this is the whole program

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())

    def mix(self) -> dict[str, float]:
        """Share of each class."""
        return {kind: round(count / self.instructions, 3) for kind, count in self.counts.items()}


# --- what an instruction does ---------------------------------------------------------------------------------------

# the first that fits; U before an NVIDIA opcode is its form for a whole warp
_SASS = (
    ("tensor core", r"(UTC\w*|[HIDQBO]G?)MMA"),
    ("load", r"(LDG|LD|LDL|LDGSTS|UBLKCP|UTMALDG|UBLKPF)"),
    ("store", r"(STG|ST|STL|RED|ATOMG?|UTMASTG|REDG)"),
    ("shared", r"(LDSM?|STSM?|LDTM|STTM|ATOMS|SHFL|MATCH)"),
    ("barrier", r"(BAR|\w*DEPBAR|MEMBAR|FENCE|SYNCS|WARPGROUP|ERRBAR|CCTL|ARRIVES|U?CGABAR\w*|UTC(BAR|ATOMSWS))"),
    ("control", r"(BRA|BRX|JMP|EXIT|BSSY|BSYNC|CALL|RET|BREAK|WARPSYNC|ENDCOLLECTIVE|NOP|YIELD|NANOSLEEP|BMOV|BPT|ELECT"
                r"|KILL|U?VOTEU?|PREEXIT|ACQBULK)"),
    ("move", r"(U?I?MOV|U?SEL|FSEL|U?PRMT|U?LDCU?|U?LDC|S2U?R|CS2U?R|R2UR|P2U?R|U?R2P|REDUX|UVIRTCOUNT)"),
    ("fp", r"(U?F(ADD|MUL|FMA|MNMX|SET|SETP|CHK|SWZADD)[23]?|U?F(HFMA|HADD)|MUFU|H(ADD|MUL|FMA|MNMX|SETP?)2?|HSETP2|"
           r"D(ADD|MUL|FMA|SETP)|F2F|F2FP|F2I|F2IP|I2F|I2FP|FRND)"),
    ("integer", r"U?(IADD3?|IMAD|VIADD|LOP3|SHF|SH[LR]|LEA|I?SETP|IABS|IMNMX|VIMNMX3?|VIADDMNMX|PLOP3|POPC|FLO|BMSK"
                r"|SGXT|BREV|IDP|I2IP?|ISETP|VABSDIFF|VHMNMX|ISCADD)"),
)  # fmt: skip
_AMDGCN = (
    ("tensor core", r"v_s?mfmac?_"),
    ("load", r"(global|buffer|flat|scratch)_load_"),
    ("store", r"(global|buffer|flat|scratch)_(store|atomic)_"),
    ("shared", r"ds_"),
    ("barrier", r"s_(barrier|waitcnt)|buffer_(inv|wbl2)"),
    ("control", r"s_(c?branch|endpgm|nop|setprio|sched|sleep|setpc|swappc|getpc|trap)"),
    ("move", r"v_(mov|accvgpr|cndmask|perm|readlane|readfirstlane|writelane|swap|alignb)|s_(mov|cmov|cselect|load"
             r"|buffer_load|memtime|getreg|setreg)"),
    ("fp", r"v_(\w*_)?(b?f16|f32|f64)\b|v_(\w*_)?(b?f16|f32|f64)_|v_(exp|log|rcp|rsq|sqrt|div|cvt)_"),
    ("integer", r"[vs]_"),
)  # fmt: skip
_SASS_RULES = tuple((kind, re.compile(rf"(?:{pattern})(?![A-Z0-9])")) for kind, pattern in _SASS)
_AMDGCN_RULES = tuple((kind, re.compile(pattern)) for kind, pattern in _AMDGCN)


def _kind(opcode: str, rules: Iterable[tuple[str, re.Pattern[str]]]) -> str:
    if opcode.startswith(("IMAD.MOV", "UIMAD.MOV")):
        return "move"
    return next((kind for kind, pattern in rules if pattern.match(opcode)), "other")


# --- from text to blocks --------------------------------------------------------------------------------------------

_SASS_LABEL = re.compile(r"^(\.L_x_\w+):")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+\{?\s*(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_TARGET = re.compile(r"`\((\.L_x_\w+)\)")


def parse_sass(text: str) -> list[Block]:
    """Blocks of one kernel. The slow path of a warp that diverged (BRA.DIV) and called functions are left out."""
    blocks = [Block(None, [])]
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            blocks.append(Block(label.group(1), []))
        elif found := _SASS_LINE.match(line):
            predicate, opcode, operands = found.groups()
            name = opcode.split(".")[0]
            # a call of a place within is a jump: it does not return; one of a function does
            jumps = name in ("BRA", "CALL") and not opcode.startswith("BRA.DIV")
            target = _SASS_TARGET.search(operands) if jumps else None
            # a predicate may also be an operand: BRA.U UP0, `(.L_x_1)
            always = predicate in (None, "PT", "UPT") and not re.match(r"!?U?P\d", operands)
            ends = always and (target is not None or name in ("EXIT", "RET", "BRX", "JMP", "KILL"))
            instruction = Instruction(opcode, _kind(opcode, _SASS_RULES), target and target.group(1), ends)
            blocks[-1].lines.append(instruction)
            if target or ends:
                blocks.append(Block(None, []))
    return blocks


_AMDGCN_LABEL = re.compile(r"^(\.LBB\w+):")
_AMDGCN_LINE = re.compile(r"^\s+([a-z][a-z0-9]*_\w+)(?:\s+(\.LBB\w+))?")


def parse_amdgcn(text: str) -> list[Block]:
    """Blocks of one kernel."""
    blocks = [Block(None, [])]
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        if label := _AMDGCN_LABEL.match(line):
            blocks.append(Block(label.group(1), []))
        elif found := _AMDGCN_LINE.match(line):
            opcode, target = found.groups()
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            blocks[-1].lines.append(Instruction(opcode, _kind(opcode, _AMDGCN_RULES), target, ends))
            if target or ends:
                blocks.append(Block(None, []))
    return blocks


# --- loops ----------------------------------------------------------------------------------------------------------


def _successors(blocks: Sequence[Block]) -> list[set[int]]:
    at = {block.label: i for i, block in enumerate(blocks) if block.label is not None}
    following: list[set[int]] = []
    for i, block in enumerate(blocks):
        last = block.lines[-1] if block.lines else None
        here = {at[last.label]} if last and last.label in at else set()
        if (last is None or not last.ends) and i + 1 < len(blocks):
            here.add(i + 1)
        following.append(here)
    return following


def _reachable(following: Sequence[set[int]], without: int | None = None) -> set[int]:
    """Blocks that can be reached from the first, on ways that do not pass `without`."""
    seen: set[int] = set()
    todo = [0] if without != 0 else []
    while todo:
        block = todo.pop()
        if block not in seen:
            seen.add(block)
            todo += [b for b in following[block] if b != without]
    return seen


def loops(blocks: Sequence[Block]) -> list[set[int]]:
    """The natural loops, as sets of blocks; those that share a first block are one."""
    following = _successors(blocks)
    alive = _reachable(following)
    preceding: list[set[int]] = [set() for _ in blocks]
    for block in alive:
        for target in following[block]:
            preceding[target].add(block)
    found: dict[int, set[int]] = {}
    for head in alive:
        behind = alive - _reachable(following, without=head)  # blocks that only the head leads to
        body = found.setdefault(head, {head})
        todo = [block for block in preceding[head] if block in behind]
        if not todo:
            del found[head]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += preceding[block]
    return list(found.values())


def lines(blocks: Sequence[Block], chosen: Iterable[int] | None = None) -> list[Instruction]:
    """The instructions of the chosen blocks, or all that can be reached."""
    reached = sorted(_reachable(_successors(blocks)) if chosen is None else chosen)
    return [line for i in reached for line in blocks[i].lines]


def counts(some: Iterable[Instruction]) -> dict[str, int]:
    """How many there are of each class, in CLASSES' order and where there are any."""
    number = Counter(line.kind for line in some)
    return {kind: number[kind] for kind in CLASSES if number[kind]}


def _works(some: Iterable[Instruction]) -> bool:
    """Whether there is a product or an access of global memory: a wait for a barrier is a loop too."""
    return any(line.kind in ("tensor core", "load", "store") for line in some)


def hot_loop(blocks: Sequence[Block]) -> tuple[Loop, list[Instruction]]:
    """The innermost loop that works, the largest of them; without any, the largest; without loops, all that runs."""
    bodies = loops(blocks)
    if not bodies:
        return Loop(counts(lines(blocks)), whole=True), lines(blocks)
    candidates = [body for body in bodies if _works(lines(blocks, body))] or bodies
    innermost = [body for body in candidates if not any(other < body for other in candidates)]
    largest = max((lines(blocks, body) for body in innermost), key=len)
    return Loop(counts(largest)), largest
