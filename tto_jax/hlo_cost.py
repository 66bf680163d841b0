"""What one chip does in a compiled TPU program, counted from its text: FLOPs, bytes of HBM, bytes sent to other chips.

XLA's own analysis counts the body of a loop once; here every computation is multiplied by the trips of the loops
around it. The rules:
- FLOPs are those of matrix products (dot and convolution, 2 a multiply-add, padding excluded). Element-wise work is
  not counted. A Mosaic kernel counts what its `cost_estimate` says.
- Bytes are what instructions outside of fusions read and write in HBM, with the padding of the layout's tiles; arrays
  in on-chip memory are free. A slice reads what it takes, an update in place writes what it changes.
- A collective counts what a chip sends in a ring: (n-1)/n of the whole for all-gather, reduce-scatter and all-to-all,
  twice that for all-reduce, all of it for a permute; once, however many fusions the compiler spreads it over.
- A loop counts its trips if they are constants of the program; otherwise the most that the caller says; a conditional
  its dearest branch.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64}
ITEM_BITS |= {"u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
FREE += ("opt-barrier", "add-dependency", "iota", "domain", "async-update")
SEE_THROUGH = ("bitcast", "copy", "copy-done", "convert")
KERNEL = "tpu_custom_call"
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """What is sent by one kind of collective among groups of one size."""

    kind: str
    network: str  # ici: among the chips of a slice; dcn: between slices
    group: int  # chips, or slices; of a permute all that take part
    calls: float
    bytes: float  # sent by one chip


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one chip, for one call of the program."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    kernels: dict[str, float]  # Mosaic kernels and their calls; those without an estimate are in `uncounted` too
    dynamic: dict[str, int]  # loops that end by data, and the trips they were counted with
    uncounted: tuple[str, ...]


def count(text: str, dynamic_trips: int, slices: int = 1) -> Cost:
    """Cost of a compiled module.

    Args:
      text: the optimised module, as XLA dumps it (`after_optimizations`) or as `jax.stages.Compiled.as_text` gives it.
      dynamic_trips: the most trips of an outermost loop whose end depends on data.
      slices: that the program spans.

    Raises:
      ValueError: this is no compiled module, or holds a type or collective that is not known.
    """
    module = _Module(text, dynamic_trips, slices)
    total = module.cost(module.entry)
    sent = [
        Collective(*key[1:], calls=total[("calls", *key[1:])], bytes=value)
        for key, value in sorted(total.items(), key=str)
        if key[0] == "sent"
    ]
    return Cost(
        flops=total[("flops",)],
        bytes=total[("bytes",)],
        collectives=tuple(sent),
        kernels={key[1]: value for key, value in total.items() if key[0] == "kernel"},
        dynamic=module.dynamic,
        uncounted=tuple(sorted(key[1] for key in total if key[0] == "uncounted")),
    )


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A piece of memory and the largest array that lies in it at some time."""

    bytes: int
    array: str


def largest_buffers(report: str, number: int = 3) -> tuple[Buffer, ...]:
    """The largest pieces of HBM that a program uses, from XLA's dump `memory-usage-report`."""
    found = []
    hbm = report.partition("Memory Space: default")[2].partition("Memory Space:")[0]
    for size, shapes in re.findall(r"^.*?\); +([\d.]+ ?[KMGT]?i?B?); *\d+; *\d+; (.*)$", hbm, re.MULTILINE)[:number]:
        amount, unit = re.fullmatch(r"([\d.]+) ?([KMGT]?)i?B?", size).groups()
        largest = max(_arrays(shapes), key=lambda array: array.bytes)
        scale = 1024 ** " KMGT".index(unit or " ")
        found.append(Buffer(int(float(amount) * scale), f"{largest.dtype}{list(largest.shape)}".replace(" ", "")))
    return tuple(found)


# Reading -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type: what it holds, what it takes in memory, and where it lies."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> float:
        """Without padding."""
        return math.prod(self.shape) * _bits(self.dtype) / 8

    @property
    def hbm(self) -> float:
        """With the padding of its tile; 0 if it lies elsewhere (`S(1)` is on-chip memory)."""
        if re.search(r"S\([1-9]", self.layout):
            return 0.0
        order, _, tiles = self.layout.partition(":")
        major = [self.shape[int(i)] for i in reversed(order.split(","))] if order else list(self.shape)
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        for back, size in enumerate(reversed(tile.group(1).split(",")) if tile else (), start=1):
            if back <= len(major):
                major[-back] = -(-major[-back] // int(size)) * int(size)
        return math.prod(major) * _bits(self.dtype) / 8


def _bits(dtype):
    if dtype not in ITEM_BITS:
        raise ValueError(f"the program holds arrays of {dtype!r}: known are {tuple(ITEM_BITS)}")
    return ITEM_BITS[dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # between the parentheses
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Of the result, tuples flattened."""
        return _arrays(self.type)

    def attribute(self, name: str) -> str | None:
        """The value of `name=`, up to the next comma or with its brackets."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found and found.group(1)

    def called(self, name: str) -> str | None:
        """The computation that attribute `name` names."""
        found = re.search(rf"\b{name}=%([^\s,}}]+)", self.attributes)
        return found and found.group(1)


def _arrays(text):
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout or "")
        for dtype, shape, layout in _ARRAY.findall(text)
        if dtype != "token"
    )


def _closing(text, begin):
    """Index behind the bracket that closes the one at `begin`."""
    depth = 0
    for index in range(begin, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"unbalanced line: {text[:200]}")


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    literal = rest[begin + 1 : end - 1]
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        type=kind,
        opcode=rest[:begin],
        operands=tuple(re.findall(r"%([^\s,()]+)", literal)),
        literal=literal,
        attributes=rest[end:],
        root=name.startswith("ROOT "),
    )


def _computations(text: str) -> Iterator[tuple[str, bool, list[Instruction]]]:
    """Name, whether it is the entry, and its instructions."""
    name, lines = None, []
    # Of a kernel with several results the compiler writes attributes over several lines.
    for line in re.sub(r'\n(?="|\}, ")', "", text).splitlines():
        if name is None:
            found = re.match(r"(ENTRY )?%?(\S+) \(.*\{$", line)
            if found:
                entry, name, lines = bool(found.group(1)), found.group(2), []
        elif line.startswith("}"):
            yield name, entry, lines
            name = None
        elif " = " in line:
            lines.append(_instruction(line))


# Counting ------------------------------------------------------------------------------------------------------------


class _Computation:
    def __init__(self, instructions):
        self.instructions = instructions
        self.by_name = {x.name: x for x in instructions}
        self.root = next(x for x in instructions if x.root)
        self.parameters = {int(x.literal): x for x in instructions if x.opcode == "parameter"}
        self.users = collections.defaultdict(list)
        for x in instructions:
            for index, operand in enumerate(x.operands):
                self.users[operand].append((x, index))

    def source(self, name: str) -> Instruction:
        """Behind what changes no value."""
        x = self.by_name[name]
        while x.opcode in SEE_THROUGH:
            x = self.by_name[x.operands[0]]
        return x


class _Module:
    def __init__(self, text, dynamic_trips, slices):
        found = list(_computations(text))
        if not any(entry for _, entry, _ in found):
            raise ValueError("this is not the text of a compiled module: it has no ENTRY computation")
        self.computations = {name: _Computation(lines) for name, _, lines in found}
        self.entry = next(name for name, entry, _ in found if entry)
        self.dynamic_trips, self.slices = dynamic_trips, slices
        self.dynamic: dict[str, int] = {}
        self._costs: dict[tuple[str, bool], collections.Counter] = {}

    def cost(self, name: str, inside_dynamic: bool = False) -> collections.Counter:
        """Of one run of a computation that is executed instruction by instruction."""
        if (name, inside_dynamic) not in self._costs:
            total = collections.Counter()
            computation = self.computations[name]
            for x in computation.instructions:
                total.update(self._instruction_cost(computation, x, inside_dynamic))
            self._costs[name, inside_dynamic] = total
        return self._costs[name, inside_dynamic]

    def _instruction_cost(self, computation, x, inside_dynamic) -> collections.Counter:
        if x.opcode in FREE or x.opcode.endswith("-done"):
            return collections.Counter()
        if x.opcode == "while":
            return self._loop(computation, x, inside_dynamic)
        if x.opcode == "conditional":
            branches = [self.cost(name, inside_dynamic) for name in _branches(x)]
            return max(branches, key=lambda cost: (cost[("flops",)], cost[("bytes",)]))
        if x.opcode == "call" or (x.opcode == "async-start" and x.called("calls")):
            return self.cost(x.called("to_apply") or x.called("calls"), inside_dynamic)
        cost = collections.Counter(self._inner(x, computation))
        cost[("bytes",)] += self._bytes(computation, x)
        return cost

    def _loop(self, computation, x, inside_dynamic):
        trips, dynamic = self._trips(computation, x), False
        if trips is None:
            dynamic, trips = True, 1 if inside_dynamic else self.dynamic_trips
            label = re.search(r'op_name="([^"]*)"', x.attributes)
            self.dynamic[label.group(1) if label else x.name] = trips
        total = collections.Counter()
        for name in (x.called("condition"), x.called("body")):
            for key, value in self.cost(name, inside_dynamic or dynamic).items():
                total[key] += value * trips
        return total

    def _trips(self, computation, loop) -> int | None:
        """Of a loop from one constant to another by a constant step; None for others."""
        known = re.search(r'known_trip_count[\\"]*:\s*\{[\\"]*n[\\"]*:[\\"]*(\d+)', loop.attributes)
        if known:
            return int(known.group(1))
        condition, body = (self.computations[loop.called(name)] for name in ("condition", "body"))
        test = condition.source(condition.root.name)
        if test.opcode != "compare" or test.attribute("direction") not in ("LT", "GT"):
            return None
        ends = [condition.source(name) for name in test.operands]
        if test.attribute("direction") == "GT":
            ends.reverse()
        if ends[0].opcode != "get-tuple-element" or ends[1].opcode != "constant":
            return None
        index = int(ends[0].attribute("index"))
        start = computation.source(loop.operands[0])
        start = computation.source(start.operands[index]) if start.opcode == "tuple" else start
        step = body.source(body.root.operands[index]) if body.root.opcode == "tuple" else body.root
        step = self._step(body, step)
        if start.opcode != "constant" or not step:
            return None
        return max(0, math.ceil((int(ends[1].literal) - int(start.literal)) / step))

    def _step(self, body, x) -> int | None:
        """The constant that an addition, alone or in a fusion of its own, adds."""
        if x.opcode == "fusion":
            body = self.computations[x.called("calls")]
            x = body.source(body.root.name)
        if x.opcode != "add":
            return None
        added = [body.source(name) for name in x.operands]
        return next((int(y.literal) for y in added if y.opcode == "constant"), None)

    # What is computed and sent: inside of fusions, too.

    def _inner(self, x, computation) -> collections.Counter:
        cost = collections.Counter()
        if x.opcode == "fusion":
            inside = self.computations[x.called("calls")]
            for y in inside.instructions:
                cost.update(self._inner(y, inside))
        elif x.opcode == "convolution":
            cost[("flops",)] += _convolution_flops(x, computation)
        elif x.opcode == "dot":
            cost[("flops",)] += _dot_flops(x, computation)
        elif x.opcode.removesuffix("-start") in COLLECTIVES:
            cost.update(self._sent(x, computation))
        elif x.opcode == "send":
            cost.update(self._between_slices(x, computation))
        elif x.opcode == "custom-call":
            cost.update(_kernel(x))
        return cost

    def _sent(self, x, computation) -> collections.Counter:
        flag = re.search(r'"flag_start":"(-?\d+)"', x.attributes)
        if flag and flag.group(1) != "-1":  # a later piece of a collective that has begun in another fusion
            return collections.Counter()
        kind = x.opcode.removesuffix("-start")
        arrays = x.arrays
        if x.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
            arrays = arrays[len(x.operands) : 2 * len(x.operands)]
        size = sum(array.bytes for array in arrays)
        users = [user for user, _ in computation.users[x.name]]
        if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
            kind, size = "reduce-scatter", sum(array.bytes for user in users for array in user.arrays)
        groups = replica_groups(x.attributes)
        if not groups:
            raise ValueError(f"{x.opcode} {x.name}: its replica groups are not understood: {x.attributes[:200]}")
        chips = max(len(group) for group in groups)
        if kind == "collective-permute":
            chips = len(set(itertools.chain(*groups)))
        return _message(kind, "ici", chips, size)

    def _between_slices(self, x, computation) -> collections.Counter:
        """A send to the runtime that spans slices."""
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)
        if not found:
            return collections.Counter()
        size = sum(array.bytes for array in computation.by_name[x.operands[0]].arrays)
        return _message(found.group(1).lower().replace("_", "-"), "dcn", self.slices, size)

    # What moves in HBM: seen from outside of fusions.

    def _bytes(self, computation, x) -> float:
        operand = lambda index: sum(a.hbm for a in computation.by_name[x.operands[index]].arrays)  # noqa: E731
        written = sum(array.hbm for array in x.arrays)
        if x.opcode == "fusion":
            inside = self.computations[x.called("calls")]
            read = sum(min(operand(i), self._read(inside, i, operand(i))) for i in range(len(x.operands)))
            return read + self._written(inside, inside.root, x.arrays)
        if x.opcode == "copy-start":
            return sum(array.hbm for array in x.arrays[:2])
        if x.opcode == "slice-start":
            taken = x.arrays[1]
            return taken.hbm + (taken.bytes if x.arrays[0].hbm else 0)
        if x.opcode in ("dynamic-slice", "slice", "gather"):
            return written + (sum(array.bytes for array in x.arrays) if operand(0) else 0)
        if x.opcode == "dynamic-update-slice":
            return 2 * operand(1)
        if x.opcode == "custom-call" and (estimate := _estimate(x)):
            return estimate["bytes_accessed"]
        if x.opcode == "custom-call" and x.attribute("custom_call_target") in _BOOKKEEPING:
            return 0.0
        if x.opcode.endswith("-start"):  # of a collective: operands and results are in its type
            return written
        return written + sum(operand(index) for index in range(len(x.operands)))

    def _read(self, inside, index, full) -> float:
        """Bytes that a fusion reads of an operand that takes `full` bytes."""
        return self._used(inside, inside.parameters[index], full)[0] if full else 0.0

    def _used(self, inside, x, full) -> tuple[float, bool]:
        """Bytes that are read of a value inside a fusion, and whether it comes out again as it is."""
        total, out = 0.0, x.root
        for user, position in inside.users[x.name]:
            if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "bitcast":
                read, again = self._used(inside, user, full)
                total, out = total + read, out or again
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")]
                read, again = self._used(nested, nested.parameters[position], full)
                total += read + (self._used(inside, user, full)[0] if again else 0.0)
            elif user.opcode == "tuple":
                out = True
            elif not (_in_place(user, position) or _asynchronous(user)):
                return full, out
        return min(total, full), out

    def _written(self, inside, root, arrays) -> float:
        """Bytes that a fusion writes: `arrays` are its results as they lie outside."""
        roots = [inside.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(roots) != len(arrays):
            return sum(array.hbm for array in arrays)
        return sum(self._one_written(inside, x, array) for x, array in zip(roots, arrays) if array.hbm)

    def _one_written(self, inside, x, array):
        while x.opcode == "bitcast":
            x = inside.by_name[x.operands[0]]
        if x.opcode == "parameter" or _asynchronous(x):
            return 0.0
        if x.opcode == "dynamic-update-slice":
            return sum(a.bytes for a in inside.by_name[x.operands[1]].arrays)
        if x.opcode == "fusion":
            inner = self.computations[x.called("calls")]
            return self._written(inner, inner.root, (array,))
        return array.hbm


def _message(kind, network, group, size) -> collections.Counter:
    """What one chip sends of `size` bytes (the whole, for a reduce-scatter the part) among `group` members."""
    if group <= 1:
        return collections.Counter()
    share = (group - 1) / group
    factor = {"all-reduce": 2 * share, "reduce-scatter": group - 1, "collective-permute": 1}.get(kind, share)
    return collections.Counter({("sent", kind, network, group): size * factor, ("calls", kind, network, group): 1})


# Custom calls that move nothing in HBM by themselves.
_BOOKKEEPING = tuple(
    f'"{name}"'
    for name in (
        *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
        *("AsyncCollectiveStart", "AsyncCollectiveDone"),
    )
)


def _asynchronous(x):
    """A collective, or a piece of one."""
    return x.opcode.removesuffix("-start") in COLLECTIVES or (
        x.opcode == "custom-call" and "AsyncCollective" in x.attributes
    )


def _in_place(x, position):
    return x.opcode == "dynamic-update-slice" and position == 0


def _branches(x):
    named = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
    if named:
        return re.findall(r"%([^\s,]+)", named.group(1))
    return [x.called("true_computation"), x.called("false_computation")]


def _estimate(x) -> dict | None:
    """What the author of a Mosaic kernel says that it costs."""
    found = re.search(r'"cost_estimate": *(\{[^{}]*\})', x.attributes)
    if not found:
        return None
    said = json.loads(found.group(1))
    return {name: float(said.get(name, 0)) for name in ("flops", "bytes_accessed")}


def _kernel(x) -> collections.Counter:
    if x.attribute("custom_call_target") != f'"{KERNEL}"':
        return collections.Counter()
    label = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call"', x.attributes)
    name = label.group(1) if label else x.name
    estimate = _estimate(x)
    cost = collections.Counter({("kernel", name): 1})
    cost.update({("flops",): estimate["flops"]} if estimate else {("uncounted", name): 1})
    return cost


def _dot_flops(x, computation) -> float:
    left = computation.by_name[x.operands[0]].arrays[0].shape
    dims = x.attribute("lhs_contracting_dims").strip("{}")
    return 2.0 * math.prod(x.arrays[0].shape) * math.prod(left[int(i)] for i in dims.split(",") if i)


def _convolution_flops(x, computation) -> float:
    """2 a multiply-add that is neither padding nor a hole of a dilation.

    A batched product is a convolution here, whose batch dimensions are spatial ones with holes.
    """
    left, right = (computation.by_name[name].arrays[0].shape for name in x.operands)
    lhs, rhs, out = re.split(r"_|->", x.attribute("dim_labels"))
    written = re.search(r"window=\{([^}]*)\}", x.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", written.group(1) if written else ""))
    shape = x.arrays[0].shape
    total = 2.0 * shape[out.index("b")] * shape[out.index("f")] * right[rhs.index("i")]
    for axis in filter(str.isdigit, lhs):
        at = {name: values.split("x")[int(axis)] for name, values in window.items()}
        low = int(at.get("pad", "0_0").partition("_")[0])
        numbers = (int(at.get(name, "1")) for name in ("size", "stride", "lhs_dilate", "rhs_dilate"))
        total *= _positions(left[lhs.index(axis)], shape[out.index(axis)], *numbers, low)
    return total


@functools.lru_cache(maxsize=1024)
def _positions(size, out, kernel, stride, lhs_dilate, rhs_dilate, low) -> int:
    """How many pairs (place of the output, place of the kernel) meet an element of the input."""
    total, starts = 0, np.arange(out, dtype=np.int64) * stride - low
    for k in range(kernel):
        at = starts + k * rhs_dilate
        total += int(((at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)).sum())
    return total


def replica_groups(attributes: str) -> list[list[int]]:
    """The groups of a collective, in any of their spellings; for a permute its pairs. Empty: not understood."""
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if explicit:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", explicit.group(1))]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        over = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", named.group(2))]
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        kept = math.prod(size for axis, size in enumerate(sizes.values()) if axis not in over)
        return np.moveaxis(ids, over, range(len(over))).reshape(-1, kept).T.tolist()
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        number, size, dims, order = iota.groups()
        ids = np.arange(int(number) * int(size)).reshape([int(n) for n in dims.split(",")])
        ids = ids if order is None else ids.transpose([int(n) for n in order.split(",")])
        return ids.reshape(int(number), int(size)).tolist()
    return []
