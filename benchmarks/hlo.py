"""Reads the text of an optimised program (HLO): its operations, their estimated time, its collectives."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Parts of a program by the names of its operations, the first that fits.
PARTS = {
    "attention, qkv and out": r"attention/(qkv|out)",
    "attention, core": r"attention|shard_map",
    "MLP": r"mlp",
    "optimizer, EMA, norms": r"optimizer",
    "norms, modulation, residual": r"block_\d+/(?!attention|mlp)|final_layer",
    "embeddings": r"embed",
    "VAE": r"[Ee]ncoder|[Dd]ecoder",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
MOVES_NOTHING = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
DEFINITION = re.compile(r"\s+(?:ROOT )?%(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][a-z\-]*)\(")


class Operation(NamedTuple):
    """One line of optimised HLO."""

    opcode: str
    name: str  # in the program, such as jvp(DiT)/block_0/mlp/...
    shape: str  # of its output
    cycles: int  # of a TPU
    traffic: int  # bytes that it reads and writes
    flops: int  # of its matmuls and of cuDNN's attention
    times: int  # of a loop's body
    channel: str | None  # of a collective: the same for its start, what it overlaps with, and its end
    is_overlapped: bool
    group: int  # of a collective: the devices that take part in one; 0: all


def read_computations(text: str) -> dict[str, list[str]]:
    """{name: lines} of a program."""
    computations = {}
    lines = []
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
        if header:
            computations[header.group(1)] = lines = []
        elif line.strip():
            lines.append(line)
    return computations


def count_kernels(text: str) -> int:
    """Returns how many operations of a program are launched, copies aside: those of its main computation, and of the
    bodies and branches that it runs, each once."""
    computations = read_computations(text)
    waiting = [re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE).group(1)]
    seen = set()
    count = 0
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in computations[name]:
            opcode = DEFINITION.match(line).group("opcode") if DEFINITION.match(line) else "tuple"
            count += opcode not in (*MOVES_NOTHING, "copy", "after-all")
            if opcode in ("while", "conditional", "call"):
                called = r"(?:body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)"
                waiting += re.findall(called, line)
    return count


def count_rounds(computations: dict[str, list[str]]) -> dict[str, int]:
    """{body: rounds} of the loops: what XLA states, or the bound of the condition over the steps that a body unrolls,
    of which each sends in both directions."""
    rounds = {}
    for line in (line for lines in computations.values() for line in lines if " while(" in line):
        body = re.search(r"body=%?([\w.\-]+)", line).group(1)
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        bounds = (
            re.findall(r"constant\((\d+)\)", " ".join(computations.get(condition.group(1), ()))) if condition else []
        )
        sends = sum(" collective-permute-start(" in each for each in computations.get(body, ()))
        rounds[body] = int(known.group(1)) if known else max(1, int((bounds or [1])[-1]) // max(1, sends // 2))
    return rounds


def read_shapes(computations: dict[str, list[str]]) -> dict[str, str]:
    """{name: shape} of all that a program defines."""
    matches = (DEFINITION.match(line) for lines in computations.values() for line in lines)
    return {match.group("name"): match.group("shape") for match in matches if match}


def read_operands(line: str) -> list[str]:
    """Names between the opcode's parentheses."""
    return re.findall(r"%([\w.\-]+)", line[DEFINITION.match(line).end() :].split(")", 1)[0])


def count_traffic(line: str, shapes: dict[str, str]) -> int:
    """Bytes of the operands and of the output, each once."""
    operands = sum(count_bytes(shapes.get(name, "")) for name in read_operands(line))
    return operands + count_bytes(DEFINITION.match(line).group("shape"))


def count_axes(shape: str) -> list[int]:
    return [int(size) for size in re.search(r"\[([\d,]*)\]", shape).group(1).split(",") if size]


def count_matmuls(computations: dict[str, list[str]], shapes: dict[str, str]) -> dict[str, int]:
    """{computation: FLOPs of its matmuls, and of those of the computations that it calls}."""

    def count(name: str) -> int:
        total = 0
        for line in computations.get(name, ()):
            total += sum(count(called) for called in re.findall(r"calls=%?([\w.\-]+)", line))
            if " dot(" in line:
                total += count_dot(line, shapes)
        return total

    return {name: count(name) for name in computations}


def count_dot(line: str, shapes: dict[str, str]) -> int:
    left = count_axes(shapes[read_operands(line)[0]])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line).group(1)
    inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * math.prod(count_axes(DEFINITION.match(line).group("shape"))) * inner


def count_flops(line: str, shapes: dict[str, str], matmuls: dict[str, int]) -> int:
    """Counts the operations of the matmuls in a fusion, or of cuDNN's attention: two forward, five backward
    (arXiv:2205.14135)."""
    if "__cudnn$fmha" in line:
        query, key = (count_axes(shapes[name]) for name in read_operands(line)[:2])
        images, queries, heads, width = query
        return (10 if "Backward" in line else 4) * images * heads * queries * key[1] * width
    if " dot(" in line:
        return count_dot(line, shapes)
    called = re.search(r"calls=%?([\w.\-]+)", line)
    return matmuls.get(called.group(1), 0) if called else 0


def count_group(line: str) -> int:
    """Devices in a group of a collective, from any of the forms {{0,1},{2,3}}, [groups,devices]<=[...] and
    mesh['axis'=size, ...] {'axis', ...}; 0 where none are given: all."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed.group(1).count(",") + 1
    if shaped := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(shaped.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named.group(2)))
    return 0


def read_operations(text: str) -> Iterator[Operation]:
    """All operations of a program, those of a loop with the number of its rounds."""
    computations = read_computations(text)
    rounds = count_rounds(computations)
    shapes = read_shapes(computations)
    matmuls = count_matmuls(computations, shapes)
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    for computation, lines in computations.items():
        for line in lines:
            found = DEFINITION.match(line)
            if not found:
                continue
            opcode = found.group("opcode")
            is_within = computation in fused or opcode in MOVES_NOTHING
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            name = re.search(r'op_name="([^"]*)"', line)
            channel = re.search(r"channel_id=(\d+)", line)
            # TPUs have reduce-scatter as a fusion of an all-reduce and a slice.
            is_scattered = computation.startswith("all-reduce-scatter") and opcode.startswith("all-reduce")
            yield Operation(
                opcode="reduce-scatter" if is_scattered else opcode,
                name=name.group(1) if name else "",
                shape=found.group("shape"),
                cycles=int(cycles.group(1)) if cycles else 0,
                traffic=0 if is_within else count_traffic(line, shapes),
                flops=0 if is_within else count_flops(line, shapes, matmuls),
                times=rounds.get(computation, 1),
                channel=channel.group(1) if channel else None,
                is_overlapped="async" in computation or opcode.endswith("-start"),
                group=count_group(line),
            )


def part_of(operation: Operation) -> str:
    if operation.opcode in ("copy", "transpose", "copy-start", "copy-done"):
        return "layout copies"
    return next((part for part, pattern in PARTS.items() if re.search(pattern, operation.name)), "other")


def count_bytes(shape: str) -> int:
    """Counts the bytes of an HLO shape, such as bf16[64,256]{1,0} or a tuple of them."""
    return sum(
        SIZES.get(dtype, 4) * math.prod(int(size) for size in axes.split(",") if size)
        for dtype, axes in re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    )


def list_collectives(operations: list[Operation]) -> list[str]:
    """One line for each kind, dtype and size of group: how many, how many bytes on a device (before a reduce-scatter,
    after any other), and whether they overlap with compute."""
    found = [operation for operation in operations if operation.opcode.removesuffix("-start") in COLLECTIVES]
    # One that is overlapped appears several times, as its start, within what it overlaps with, and as its end.
    overlapped = {operation.channel: operation for operation in found if operation.is_overlapped and operation.channel}
    separate = [operation for operation in found if operation.channel not in overlapped]
    counts = collections.Counter()
    sizes = collections.Counter()
    for operation in (*overlapped.values(), *separate):
        # An asynchronous one's output is a tuple of operands and results.
        parts = re.findall(r"\b[a-z]+\d*\[[\d,]*\]", operation.shape)
        parts = [part for part in parts if part not in ("u32[]", "s32[2]")] or parts
        shape = parts[-1] if operation.opcode.endswith("-start") else " ".join(parts)
        how = "overlapped" if operation.is_overlapped else "synchronous"
        key = (operation.opcode.removesuffix("-start"), shape.split("[")[0], how, operation.group)
        counts[key] += operation.times
        sizes[key] += operation.times * count_bytes(shape)
    return [
        f"{count} {kind} of {dtype}{f' over {group}' if group else ''}, "
        f"{sizes[kind, dtype, how, group] / 2**20:,.0f} MiB a device, {how}"
        for (kind, dtype, how, group), count in sorted(counts.items())
    ]
