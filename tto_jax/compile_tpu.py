"""Compile a run's programs for a TPU pod that is not there: does it fit, and what bounds its speed.

    python -m tto_jax.compile_tpu --config=configs/brpo_r1_qwen_1p5b_8k.py --topology=v5e:8x8
      [--num_slices=2] [--mesh=1,64,1] [--fit] [--parts=think,update] [--json=FILE] [--config.a.b=value]
    python -m tto_jax.compile_tpu --table=FOLDER      # what --json wrote there, as the README's table

Needs libtpu, no TPU: pip install "tto-jax[tpu]". Compiles what a training step calls, one row each: weights (cast and
laid out for the rollout), prefill, think (one segment), answers, logprobs, update (the gradient of one minibatch),
apply (the optimizer). Bytes, FLOPs and bounds are those of one chip and one call, all rows as long as can be; a bound
is what the work takes at the chip's peak, a run is slower. Exits with 1 if a part does not fit. --fit first searches
learner.micro_tokens and model.remat for the fastest update that does. --parts=update,flattened compiles beside the
update one of the same traces whose branches are rows of their own.
"""

import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterator

import jax
from absl import app, flags, logging
from etils import epath
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from tto_jax import aot, host, settings, sharding, tpu_chips
from tto_jax.models.config import REMAT
from tto_jax.settings import Settings

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, such as configs/math.py.", lock_config=True, allow_override=True
)
_TOPOLOGY = flags.DEFINE_string("topology", None, f"Chip and slice, such as {', '.join(tpu_chips.EXAMPLES)}.")
_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices, spanned by the mesh axis data.", lower_bound=1)
_MESH = flags.DEFINE_list("mesh", None, "data,fsdp,tensor; the same as --config.mesh.")
_PARTS = flags.DEFINE_list("parts", None, f"Some of {', '.join(aot.PARTS)}; default: all of these. Or {aot.FLATTENED}.")
_FIT = flags.DEFINE_bool("fit", False, "Search micro_tokens and remat for the fastest update that fits.")
_TABLE = flags.DEFINE_string("table", None, "A folder of --json files, which are printed as one table.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written, a JSON object a line.", allow_override=True)

ENVIRONMENT = {  # else libtpu asks the machine for these, and locks it, as if it were to drive a TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HEADER = (
    f"{'part':10}{'calls':>6}{'compiled':>10}{'arguments':>11}{'temporary':>11}{'beside':>8}{'total of limit, GiB':>21}"
    f"{'TFLOP':>9}{'HBM GB':>9}{'sent GB':>9}{'bound, s':>10}  by"
)
SHOWN_SHARE = 0.01  # of what is sent: collectives below are not printed


@dataclasses.dataclass(frozen=True)
class Pod:
    """What is compiled for."""

    topology: str
    slices: int
    chip: tpu_chips.Chip
    mesh: Mesh


def main(argv):
    """The page."""
    if _TABLE.value:
        print(table(epath.Path(_TABLE.value)))
        return
    if len(argv) > 1 or not (_CONFIG.value and _TOPOLOGY.value):
        raise app.UsageError(
            f"--config and --topology are needed, such as {tpu_chips.EXAMPLES[0]}, and every option is a flag"
        )
    logging.set_verbosity(logging.WARNING)
    names = tuple(_PARTS.value or aot.PARTS)
    if unknown := sorted(set(names) - {*aot.PARTS, aot.FLATTENED}):
        raise app.UsageError(f"--parts={unknown}: choose from {(*aot.PARTS, aot.FLATTENED)}")
    config, rows = _CONFIG.value, []
    if _MESH.value:
        config.mesh = tuple(int(size) for size in _MESH.value)
    pod = describe(_TOPOLOGY.value, _SLICES.value, config.mesh)
    print(f"{pod.topology}, slices: {pod.slices}, chips: {pod.mesh.size}, mesh: {dict(pod.mesh.shape)}\n{HEADER}")
    if _FIT.value:
        rows += fit(config, pod)
        if best := fastest(rows):
            config.learner.micro_tokens, config.model.remat = best["micro_tokens"], best["remat"]
            print(f"chosen: --config.learner.micro_tokens={best['micro_tokens']} --config.model.remat={best['remat']}")
    plan = on(config, pod)
    found = aot.parts(plan, pod.mesh)
    if aot.FLATTENED in names:
        found[aot.FLATTENED] = aot.flattened_update(plan, pod.mesh)
    results = [show(config, plan, pod, found[name]) for name in names]
    print(closing(results))
    if _JSON.value:
        epath.Path(_JSON.value).write_text("".join(json.dumps(row) + "\n" for row in rows + results))
    sys.exit(not all(row["fits"] for row in results))


def describe(topology: str, slices: int, shape: tuple[int, int, int]) -> Pod:
    """The pod's devices as a mesh of `shape`; none of them has to exist.

    Raises ValueError for a topology or a mesh that cannot be; RuntimeError, with the command, where libtpu is missing.
    """
    chip = tpu_chips.of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"libtpu is missing; no TPU is needed for it: pip install '{wanted_libtpu()}'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology={topology!r}: libtpu has no such slice ({error}); choose one like {tpu_chips.EXAMPLES}"
        ) from error
    return Pod(topology, slices, chip, sharding.make_mesh(shape, found.devices))


def wanted_libtpu() -> str:
    """The libtpu that goes with the installed jax, as a requirement."""
    for line in importlib.metadata.requires("jax") or ():
        if line.startswith("libtpu"):
            return line.partition(";")[0].strip()
    return "libtpu"


def on(config: ConfigDict, pod: Pod) -> Settings:
    """The settings on the pod. Raises ValueError if its rows or heads cannot be split over the mesh."""
    plan = settings.build(config, need_model=False)
    plan.check_rows(pod.mesh)
    plan = plan.on(pod.mesh)
    plan.check_slots(pod.mesh, pod.chip.hbm)
    return plan


def fit(config: ConfigDict, pod: Pod) -> list[dict]:
    """Rows of the updates that were tried: tokens of so many of the longest rows as divide a part's, smallest first,
    with every remat; where one does not fit, larger ones are not tried, and none where the smallest with full remat
    does not.
    """
    config, rows = copy.deepcopy(config), []
    plan = settings.build(config, need_model=False)
    part_rows, length = minibatch_rows(plan, pod), plan.row_length
    for remat in reversed(REMAT):
        for micro in (n for n in range(1, part_rows + 1) if part_rows % n == 0):
            config.learner.micro_tokens, config.model.remat = micro * length, remat
            plan = on(config, pod)
            rows.append(show(config, plan, pod, aot.parts(plan, pod.mesh)["update"], trial=True))
            if not rows[-1]["fits"]:
                break
        if not any(row["fits"] for row in rows):
            break
    return rows


def minibatch_rows(plan: Settings, pod: Pod) -> int:
    """Of each part of the mesh."""
    return plan.rows // plan.minibatches // sharding.row_shards(pod.mesh)


def fastest(rows: list[dict]) -> dict | None:
    """The row of least bound among those that fit."""
    return min((row for row in rows if row["fits"]), key=lambda row: row["bound_s"], default=None)


def show(config: ConfigDict, plan: Settings, pod: Pod, part: aot.Part, trial: bool = False) -> dict:
    """Compile a part, print what was found, and return it as a row."""
    compiled = aot.compile_part(part, pod.mesh, pod.chip, pod.slices)
    row = record(config, plan, pod, compiled) | {"trial": trial}
    label = f"micro_rows={row['micro_rows']} remat={row['remat']}\n" if trial else ""
    print(label + line(row), flush=True)
    for note in notes(row):
        print(f"    {note}")
    if not compiled.fits:
        largest = ", ".join(f"{x.array} {x.bytes / 2**30:.2f} GiB" for x in compiled.largest)
        print(
            f"    DOES NOT FIT: {compiled.why} Largest: {largest}.\n    Try {advice(plan, pod, part.name)}.", flush=True
        )
    return row


def record(config: ConfigDict, plan: Settings, pod: Pod, found: aot.Compiled) -> dict:
    """What JSON holds of a part; bytes, FLOPs and seconds are of one chip and one call."""
    cost = found.cost
    return {
        "part": found.part,
        "variant": config.variant,
        "topology": pod.topology,
        "num_slices": pod.slices,
        "chips": pod.mesh.size,
        "mesh": list(pod.mesh.shape.values()),
        "micro_tokens": config.learner.micro_tokens,
        "micro_rows": plan.loss.micro_rows(minibatch_rows(plan, pod)),  # of the longest, of each part of the mesh
        "remat": config.model.remat,
        "calls": found.calls,
        "compile_s": round(found.compile_s, 2),
        "hbm_bytes": dataclasses.asdict(found.hbm_bytes),
        "hbm_limit": found.hbm_limit,
        "fits": found.fits,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collective_bytes": sum(x.bytes for x in cost.collectives),
        "collectives": [dataclasses.asdict(x) for x in cost.collectives],
        "kernels": cost.kernels,
        "uncounted_kernels": list(cost.uncounted),
        "worst_case_loops": cost.dynamic,
        "largest_buffers": [dataclasses.asdict(x) for x in found.largest],
        "bounds_s": found.bounds,
        "bound_s": found.bound_s,
        "bound_by": found.bound_by,
        "why": found.why,
        "versions": host.versions() | {"libtpu": importlib.metadata.version("libtpu")},
    }


def line(row: dict) -> str:
    """A row of the table."""
    memory, gib = row["hbm_bytes"], 2**30
    text = f"{row['part']:10}{row['calls']:6}{row['compile_s']:9.0f}s{memory['arguments'] / gib:11.2f}"
    text += f"{memory['temporaries'] / gib:11.2f}{memory['held'] / gib:8.2f}"
    text += f"{memory['total'] / gib:12.2f} of {row['hbm_limit'] / gib:5.2f}"
    text += f"{row['flops'] / 1e12:9.3g}{row['bytes'] / 1e9:9.3g}{row['collective_bytes'] / 1e9:9.3g}"
    return text + f"{row['bound_s']:10.3g}  {row['bound_by']}"


def notes(row: dict) -> Iterator[str]:
    """What the table has no column for."""
    large = [x for x in row["collectives"] if x["bytes"] >= SHOWN_SHARE * row["collective_bytes"]]
    if large:
        yield "sends " + ", ".join(
            f"{x['bytes'] / 1e9:.3g} GB by {x['calls']:.0f} x {x['kind']} over {x['group']} "
            f"{'slices' if x['network'] == 'dcn' else 'chips'}"
            for x in large
        )
    for loop, trips in row["worst_case_loops"].items():
        yield f"{loop} may end early; counted with {trips} trips, its most"
    for kernel, calls in row["kernels"].items():
        yield f"kernel {kernel}: {calls:.0f} calls" + (
            "; its FLOPs are not known" if kernel in row["uncounted_kernels"] else ""
        )


def advice(plan: Settings, pod: Pod, part: str) -> str:
    """What could make a part fit."""
    tensor, heads = pod.mesh.shape["tensor"], plan.model.num_heads
    more = [n for n in range(tensor + 1, heads + 1) if heads % n == 0 and pod.mesh.size % n == 0]
    ways = []
    if part in ("update", "logprobs"):
        if plan.loss.micro_rows(minibatch_rows(plan, pod)) > 1:
            ways.append(f"learner.micro_tokens={plan.row_length}")
        if part == "update" and plan.model.remat != "full":
            ways.append("model.remat=full")
    else:
        ways.append("fewer rollout.problems or rollout.group_size")
    if more:
        ways.append(f"more devices on tensor ({', '.join(map(str, more))})")
    return ", ".join([*ways, "a pod of more chips or chips with more memory"])


def closing(rows: list[dict]) -> str:
    """What a step takes at least, over its parts."""
    shares = ", ".join(f"{row['part']} {row['calls'] * row['bound_s']:.3g} ({row['bound_by']})" for row in rows)
    total = sum(row["calls"] * row["bound_s"] for row in rows)
    lacking = [row["part"] for row in rows if not row["fits"]]
    text = f"these parts take at least {total:.3g} s a step: {shares}"
    return text + (f"\nDO NOT FIT: {', '.join(lacking)}" if lacking else "\nall fit")


def table(folder: epath.Path) -> str:
    """Markdown, a line a file of `folder`: what each part holds, and what a step takes at least.

    Raises ValueError if a file has no update or a part twice, and where there is no file.
    """
    names = ("think", "answers", "logprobs", "update")
    lines = [
        "| configuration | topology | data x fsdp x tensor | HBM | thinking | answers | log-probs | update "
        "| a step takes at least | most of it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl") if folder.exists() else []
    if not paths:
        raise ValueError(f"--table={folder}: no .jsonl file lies there; write some with --json")
    for path in paths:
        found = [row for row in map(json.loads, path.read_text().splitlines()) if not row["trial"]]
        rows = {row["part"]: row for row in found}
        if len(rows) < len(found) or not rows.keys() >= set(names):
            raise ValueError(f"{path} has the parts {[row['part'] for row in found]}: a table needs {names}, each once")
        seconds = {name: row["calls"] * row["bound_s"] for name, row in rows.items()}
        most, update = max(seconds, key=seconds.get), rows["update"]
        held = [f"{rows[name]['hbm_bytes']['total'] / 2**30:.1f}" for name in names]
        lines.append(
            f"| `{path.stem.partition(',')[0]}` | {update['topology']} | {' x '.join(map(str, update['mesh']))} "
            f"| {update['hbm_limit'] / 2**30:.1f} | {' | '.join(held)} | {sum(seconds.values()):.3g} s "
            f"| {most}, {seconds[most]:.3g} s, {rows[most]['bound_by']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
