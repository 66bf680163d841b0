"""Measure: python -m tto_jax.bench TARGET [--shape=NAME] [--json=FILE] [--threads=1] [options of the target]

Times a part of the library beside a plain alternative and beside the least that the hardware could do, in one process
with one allocator setting (a peer has a process of its own, on the same CPUs). The first two calls are left out; the
sides are called in turns; every number is a median with its spread. Where two sides compute the same, their results are
compared first: a benchmark of a wrong answer is refused.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import jax
from etils import epath

from tto_jax import host
from tto_jax.bench import (
    branch_decode,
    credit,
    grading,
    iteration,
    limits,
    rollout,
    threads,
    token_logprobs,
    tree_attention,
    update,
)
from tto_jax.bench.options import Options
from tto_jax.bench.timing import Result, Row

# Each has SHAPES by name (the first is the default), TAKES (options beside the shape's fields), run(shape, options).
TARGETS: dict[str, ModuleType] = {
    "credit": credit,
    "grading": grading,
    "token_logprobs": token_logprobs,
    "tree_attention": tree_attention,
    "branch_decode": branch_decode,
    "rollout": rollout,
    "update": update,
    "iteration": iteration,
}
OVERRIDES = {  # flags that change a field of the shape
    "model": (str, "a model by name, with random weights"),
    "dtype": (str, "float32 or bfloat16: what is computed in"),
    "rows": (int, "rows: traces of a rollout, rows of an update or of a kernel"),
    "group": (int, "traces of a prompt"),
    "prompt": (int, "tokens of a prompt"),
    "new": (int, "sampled tokens of a trace"),
    "repeat": (int, "timed calls of each side"),
    "micro_tokens": (int, "tokens whose gradient is computed at a time, at most"),
    "buckets": (int, "row lengths of an update whose traces end anywhere; 0: all traces are full"),
    "remat": (str, "what the backward recomputes: none, dots or full"),
}
OPTIONS = {
    "hf": "a checkpoint directory instead of the shape's model",
    "peer": "a library to measure in the same run: transformers in a rollout, tunix or trl in an update",
    "implementation": "of the kernel, names with commas between; default: its default, and the reference where it fits",
    "attention": "implementation of tree_attention",
    "logprobs": "implementation of token_logprobs",
    "only": "sides to measure, names with commas between",
}
LISTS = ("implementation", "only")


def main(argv: Sequence[str] | None = None) -> None:
    """The page."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    flags = parser.parse_args(argv)
    try:
        if flags.threads is not None:
            threads.limit(flags.threads, argv)
        host.keep_freed_memory()
        result, shape, found = run(flags.target, flags.shape, flags)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    rows = records(flags.target, flags.shape, shape, result, found)
    print(table(rows, result, shape, found))
    if flags.json:
        path = epath.Path(flags.json)
        before = path.read_text() if path.exists() else ""
        path.write_text(before + "".join(json.dumps(record) + "\n" for record in rows))
        print(f"{len(rows)} lines added to {path}", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m tto_jax.bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("target", choices=tuple(TARGETS), help="what to measure")
    parser.add_argument("--shape", help="sizes, by name; default: the target's first")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line a row")
    parser.add_argument("--threads", type=int, help="run on so many CPUs; the page starts again for that")
    parser.add_argument("--peak_flops", type=float, help="of the device, a second; default: known or measured")
    parser.add_argument("--peak_bandwidth", type=float, help="of its memory, bytes a second; likewise")
    for name, (kind, text) in OVERRIDES.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", help=text)
    return parser


def run(target: str, shape_name: str | None, flags) -> tuple[Result, object, limits.Limits]:
    """Measures one target: (result, resolved shape, limits of the device).

    Raises ValueError for what cannot work, RuntimeError if the sides disagree.
    """
    module = TARGETS[target]
    shape, options = resolve(target, shape_name, flags)
    dtype = getattr(shape, "dtype", "float32")
    found = limits.of_device(dtype, flags.peak_flops, flags.peak_bandwidth)
    result = module.run(shape, options)
    if not result.difference <= result.tolerance:
        raise RuntimeError(
            f"{target}, shape {shape_name}: the sides differ by {result.difference}, allowed is {result.tolerance}; "
            "nothing was reported"
        )
    return result, shape, found


def resolve(target: str, shape_name: str | None, flags) -> tuple[object, Options]:
    """The shape with the flags' values in its fields, and the options. Raises ValueError for flags that say nothing."""
    module = TARGETS[target]
    name = shape_name or next(iter(module.SHAPES))
    if name not in module.SHAPES:
        raise ValueError(f"--shape={name!r} is unknown: choose one of {tuple(module.SHAPES)}")
    shape = module.SHAPES[name]
    fields = [field.name for field in dataclasses.fields(shape)]
    changed = {key: getattr(flags, key) for key in OVERRIDES if getattr(flags, key) is not None}
    given = {key: getattr(flags, key) for key in OPTIONS if getattr(flags, key) is not None}
    if wrong := [key for key in changed if key not in fields] + [key for key in given if key not in module.TAKES]:
        takes = [key for key in OVERRIDES if key in fields] + list(module.TAKES)
        raise ValueError(f"{target} has no --{wrong[0]}: it takes {', '.join('--' + key for key in takes) or 'none'}")
    for key, value in changed.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{key}={value}: it must be at least 1")
    given |= {key: tuple(given[key].split(",")) for key in LISTS if key in given}
    return dataclasses.replace(shape, **changed), Options(**given)


def records(target: str, shape_name: str | None, shape, result: Result, found: limits.Limits) -> list[dict]:
    """One JSON-able record a row, each with everything needed to read it alone."""
    device = jax.local_devices()[0]
    common = {
        "target": target,
        "shape": shape_name or next(iter(TARGETS[target].SHAPES)),
        "sizes": dataclasses.asdict(shape),
        "ratios": result.ratios,
        "difference": result.difference,
        "notes": result.notes,
        "limits": dataclasses.asdict(found),
        "device": device.device_kind,
        "platform": device.platform,
        "cpus": os.cpu_count(),
        "threads": threads.available(),
        "environment": {k: os.environ[k] for k in ("XLA_FLAGS", "NPROC", "GLIBC_TUNABLES") if k in os.environ},
        "commit": host.commit(),
        "versions": host.versions(),
    }
    return [_figures(row, found) | common for row in result.rows]


def _figures(row: Row, found: limits.Limits) -> dict:
    """The numbers of one side."""
    timing, memory = row.timing, row.memory
    share, by = found.share(row.work, timing.median) if row.work.flops or row.work.bytes else (None, None)
    return {
        "name": row.name,
        "median_s": timing.median,
        "min_s": timing.low,
        "max_s": timing.high,
        "n": timing.n,
        "cpu_s": timing.cpu,
        "tokens": row.tokens,
        "tokens_per_s": row.tokens / timing.median if row.tokens else None,
        "peak_bytes": memory and memory.peak,
        "first_call_peak_bytes": memory and memory.first_call,
        "peak_from": memory and memory.source,
        "compile_s": row.compile_s,
        "compiled_later": row.compiled_later,
        "flops": row.work.flops,
        "bytes": row.work.bytes,
        "flops_per_s": row.work.flops / timing.median,
        "gb_per_s": row.work.bytes / timing.median / 1e9,
        "bound_by": by,
        "share_of_limit": share,
    }


COLUMNS = {  # heading: of a record
    "median ms": lambda r: f"{1e3 * r['median_s']:,.2f}",
    "min": lambda r: f"{1e3 * r['min_s']:,.2f}",
    "max": lambda r: f"{1e3 * r['max_s']:,.2f}",
    "n": lambda r: str(r["n"]),
    "cpu ms": lambda r: _or_dash(r["cpu_s"], lambda x: f"{1e3 * x:,.1f}"),
    "tokens/s": lambda r: _or_dash(r["tokens_per_s"], lambda x: f"{x:,.0f}"),
    "peak MB": lambda r: _or_dash(r["peak_bytes"], lambda x: f"{x / 1e6:,.0f}"),
    "compile s": lambda r: _or_dash(r["compile_s"], lambda x: f"{x:.2f}"),
    "GFLOP": lambda r: f"{r['flops'] / 1e9:,.2f}",
    "MB": lambda r: f"{r['bytes'] / 1e6:,.2f}",
    "GFLOP/s": lambda r: f"{r['flops_per_s'] / 1e9:,.2f}",
    "GB/s": lambda r: f"{r['gb_per_s']:,.2f}",
    "of limit": lambda r: _or_dash(r["share_of_limit"], lambda x: f"{100 * x:.1f}% {r['bound_by']}"),
}


def _or_dash(value, spell):
    return "-" if value is None else spell(value)


def table(rows: Sequence[dict], result: Result, shape, found: limits.Limits) -> str:
    """Aligned text."""
    lines = [["", *COLUMNS]] + [[row["name"], *(spell(row) for spell in COLUMNS.values())] for row in rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(width[0])] + [cell.rjust(w) for cell, w in zip(line[1:], width[1:])]) for line in lines
    ]
    sizes = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(shape).items())
    first = f"{rows[0]['target']}, shape {rows[0]['shape']}: {sizes}"
    device = f"{rows[0]['device']}, {rows[0]['threads']} CPUs; limits {found.flops / 1e9:,.0f} GFLOP/s, "
    device += f"{found.bandwidth / 1e9:,.1f} GB/s ({found.source})"
    ratios = ", ".join(f"{value:,.2f} {name}" for name, value in result.ratios.items())
    notes = [f"{name}: {value}" for name, value in result.notes.items()]
    late = [row["name"] for row in rows if row["compiled_later"]]
    notes += [f"COMPILED WHILE TIMED: {', '.join(late)}"] if late else []
    last = f"{ratios}{'; ' if ratios else ''}largest difference {result.difference:.1e}"
    return "\n".join([first, device, *text, *notes, last])
