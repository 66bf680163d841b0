"""A lower floor never imports a higher one. Read from the sources, imports inside functions included."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tto_jax"

FLOORS = {  # a module's floor is that of the longest name that it starts with
    "tto_jax": 0,  # the package itself: whatever it imported, every module would
    "tto_jax.core": 0,
    "tto_jax.kernels": 1,
    "tto_jax.tasks": 1,
    "tto_jax.verifier": 1,
    "tto_jax.hlo_cost": 1,
    "tto_jax.tpu_chips": 1,
    "tto_jax.models": 2,
    "tto_jax.sharding": 2,
    "tto_jax.rollout": 3,
    "tto_jax.buckets": 2,
    "tto_jax.objectives": 3,
    "tto_jax.learner": 3,
    **dict.fromkeys((f"tto_jax.{name}" for name in ("tokenizer", "grading", "data", "checkpoint", "metrics")), 4),
    **dict.fromkeys((f"tto_jax.{name}" for name in ("evaluation", "diagnostics", "settings", "warm_start", "host")), 4),
    **dict.fromkeys(
        (
            f"tto_jax.{name}"
            for name in ("aot", "throughput", "profiling", "completions", "summary", "comparison", "preemption")
        ),
        4,
    ),
    **dict.fromkeys(
        (
            f"tto_jax.{name}"
            for name in (
                "distributed",
                "inputs",
                "selected",
                "solutions",
                "chats",
                "crediting",
                "examples",
                "supervised",
                "episodes",
                "math_task",
                "pretrained",
                "problem_files",
                "continuing",
                "extrapolation",
                "linearised",
                "token_efficiency",
                "variants",
                "prefixes",
                "problem_sets",
                "reference_values",
                "resampling",
            )
        ),
        4,
    ),
    **dict.fromkeys(
        (f"tto_jax.{name}" for name in ("train", "evaluate", "bench", "report", "compile_tpu", "sft", "star")), 5
    ),
    **dict.fromkeys((f"tto_jax.{name}" for name in ("convert", "prepare_data", "backtracking", "variance")), 5),
}
ONLY = {  # what these may import beside the standard library
    "tto_jax": (),
    "tto_jax.core": ("jax", "numpy", "chex", "tto_jax.core"),
    "tto_jax.kernels": ("jax", "numpy", "chex", "tto_jax.core", "tto_jax.kernels"),
    "tto_jax.tasks": ("numpy", "tto_jax.tasks"),
    "tto_jax.verifier": ("latex2sympy2_extended", "sympy", "tto_jax.verifier"),
}


def sources() -> dict[str, str]:
    """Module name -> source, of the whole package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def longest_prefix(module: str, table) -> str | None:
    names = [name for name in table if module == name or (name != PACKAGE and module.startswith(name + "."))]
    return max(names, key=len) if names else None


def imports(module: str, source: str, modules, is_package: bool) -> set[str]:
    """Full names of what a module imports; `from tto_jax.core import x` is tto_jax.core.x if there is such a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else base for name in names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found.add("an import that is computed")
    return found


def _within(module: str, names) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def violations(modules: dict[str, str]) -> list[str]:
    """Sentences, one a broken rule."""
    wrong, graph = [], {}
    packages = {name.rpartition(".")[0] for name in modules}
    for module, source in modules.items():
        place = longest_prefix(module, FLOORS)
        if place is None:
            wrong.append(f"{module} has no floor: give it one in tests/test_layering.py")
            continue
        found = imports(module, source, modules, module in packages)
        graph[module] = {name for name in found if name in modules}
        allowed = ONLY.get(longest_prefix(module, ONLY))
        for name in sorted(found):
            other = longest_prefix(name, FLOORS)
            if name.partition(".")[0] in ("configs", "tests", "launch") or name == "an import that is computed":
                wrong.append(f"{module} has {name}: no module of the package may")
            elif other and FLOORS[other] > FLOORS[place]:
                wrong.append(f"{module} (floor {FLOORS[place]}) imports {name} (floor {FLOORS[other]})")
            elif name.startswith(PACKAGE + ".") and not other:
                wrong.append(f"{module} imports {name}, which has no floor")
            elif allowed is not None and not _within(name, (*sys.stdlib_module_names, *allowed)):
                wrong.append(f"{module} imports {name}: it may import the standard library and {allowed}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a cycle: {' imports '.join(reversed(error.args[1]))}")
    return wrong


def test_no_upward_import():
    modules = sources()
    assert len(modules) > 25, "the package was not found"
    assert violations(modules) == []


CLEAN = {
    "tto_jax": "",
    "tto_jax.core": "",
    "tto_jax.core.types": "import dataclasses\nimport jax.numpy as jnp\nimport chex",
    "tto_jax.core.credit": "from tto_jax.core.types import Credit\nfrom tto_jax.core import types",
    "tto_jax.kernels": "",
    "tto_jax.kernels.one": "from tto_jax.kernels.one import api",
    "tto_jax.kernels.one.api": "from tto_jax.core.types import Array\nfrom . import reference",
    "tto_jax.kernels.one.reference": "from ...core import credit",
    "tto_jax.tasks.peak": "import numpy as np",
    "tto_jax.models.decoder": "import flax\nfrom tto_jax.kernels.one import api",
    "tto_jax.learner": "import optax\nfrom tto_jax.models import decoder",
    "tto_jax.settings": "from tto_jax import learner, tasks\nfrom tto_jax.tasks import peak",
    "tto_jax.report": "import matplotlib",
    "tto_jax.evaluate": "from tto_jax import report, settings",
}


def test_the_synthetic_package_is_clean():
    """Otherwise each case below could pass for the wrong reason."""
    assert violations(CLEAN) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        (
            "tto_jax.core.types",
            "from tto_jax.kernels.one.api import op",
            r"core.types (floor 0) imports tto_jax.kernels",
        ),
        ("tto_jax.core.types", "def f():\n    from tto_jax import learner", "imports tto_jax.learner (floor 3)"),
        ("tto_jax.core.types", "import flax.nnx", "core.types imports flax.nnx: it may import"),
        ("tto_jax.core.types", "from ..models import decoder", "imports tto_jax.models.decoder (floor 2)"),
        ("tto_jax.core.types", "from tto_jax.core import credit", "a cycle"),
        ("tto_jax.kernels.one.api", "from tto_jax.tasks import peak", "api imports tto_jax.tasks.peak"),
        ("tto_jax.tasks.peak", "import jax", "tasks.peak imports jax"),
        ("tto_jax.tasks.peak", "import sympy", "tasks.peak imports sympy"),
        ("tto_jax.tasks.peak", "from tto_jax.core import types", "tasks.peak imports tto_jax.core.types"),
        ("tto_jax.models.decoder", "from tto_jax import learner", "models.decoder (floor 2) imports tto_jax.learner"),
        ("tto_jax.learner", "import tto_jax.settings", "learner (floor 3) imports tto_jax.settings (floor 4)"),
        ("tto_jax.learner", "if False:\n    from tto_jax.report import x", "imports tto_jax.report (floor 5)"),
        ("tto_jax.settings", "from tto_jax.evaluate import load", "settings (floor 4) imports tto_jax.evaluate"),
        ("tto_jax.settings", "from configs import peak", "settings has configs"),
        (
            "tto_jax.settings",
            "import importlib\nimportlib.import_module('x')",
            "settings has an import that is computed",
        ),
        ("tto_jax.report", "from tto_jax import evaluate", "a cycle"),
        ("tto_jax", "from tto_jax.core import types", "tto_jax imports tto_jax.core.types"),
        ("tto_jax.novelty", "", "tto_jax.novelty has no floor"),
    ],
)
def test_a_violation_is_found(module, source, said):
    found = violations(CLEAN | {module: source})
    assert any(said in sentence for sentence in found), found


def test_every_module_has_a_floor():
    without = [module for module in sources() if longest_prefix(module, FLOORS) is None]
    assert without == []


def uses_jit(source: str) -> bool:
    named = {"jit", "pjit"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in named)
        or (isinstance(node, ast.Name) and node.id in named)
        or (isinstance(node, ast.alias) and node.name.rpartition(".")[2] in named)
        for node in ast.walk(ast.parse(source))
    )


def test_core_does_not_jit():
    assert uses_jit("import jax\n@jax.jit\ndef f(): pass") and uses_jit("from jax import jit as j")
    assert not uses_jit("# jax.jit\nx = 'jax.jit'")
    assert [module for module, source in sources().items() if "core" in module.split(".") and uses_jit(source)] == []


def test_configs_need_ml_collections_only():
    """An experiment's file is data: it can be read without the library."""
    for path in (ROOT / "configs").glob("*.py"):
        found = imports(f"configs.{path.stem}", path.read_text(), {}, False)
        outside = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
        assert {name.partition(".")[0] for name in outside} <= {"ml_collections", "configs"}, path
