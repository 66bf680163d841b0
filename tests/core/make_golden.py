"""Writes golden/credit.json from the oracle: `python tests/core/make_golden.py`."""

import json
import pathlib

import numpy as np
import oracles

PATH = pathlib.Path(__file__).parent / "golden" / "credit.json"
INPUTS = {
    "correct": [
        [[[0, 0], [0, 1], [1, 1]], [[1, 0], [1, 1], [0, 1]]],
        [[[0, 0], [0, 0], [1, 0]], [[1, 1], [0, 1], [1, 1]]],
    ],
    "forks": [[[10, 20, 40], [5, 5, 5]], [[10, 20, 30], [10, 15, 15]]],
    "start": [[0, 1], [0, 0]],
    "values": [[[0.25, 0.5, 0.75], [0.5, 0.5, 0.5]], [[0.0, 0.25, 0.5], [0.75, 1.0, 1.0]]],
    "scored": [[[True, False, True], [True, True, True]], [[False, True, True], [True, True, False]]],
    "coef": [[0.0, 1.0, 0.0], [0.5, 0.5, 0.125], [1.0, 0.0, -0.125]],
}
TOKENS, PRIOR = [10, 20, 40], [1.0, 1.0, 2.0]
CASES = [
    {"estimator": {"kind": "grpo"}, "arrays": [], "answers": "grpo"},
    {"estimator": {"kind": "grpo", "std": True}, "arrays": [], "answers": "brpo"},
    {"estimator": {"kind": "rloo"}, "arrays": ["scored"], "answers": "brpo"},
    {"estimator": {"kind": "brpo"}, "arrays": [], "answers": "brpo"},
    {"estimator": {"kind": "brpo", "leave_one_out": True}, "arrays": ["values"], "answers": "none"},
    {"estimator": {"kind": "brpo", "decay": 0.25}, "arrays": ["start", "scored"], "answers": "brpo"},
    {"estimator": {"kind": "brpo"}, "arrays": ["coef"], "answers": "brpo"},
    {"estimator": {"kind": "prefix"}, "arrays": [], "answers": "brpo"},
    {"estimator": {"kind": "group"}, "arrays": [], "answers": "brpo"},
    {"estimator": {"kind": "none"}, "arrays": [], "answers": "brpo"},
    {"estimator": {"kind": "mrt", "alpha": 0.5}, "arrays": ["start"], "answers": "brpo"},
    {"estimator": {"kind": "mrt", "leave_one_out": True}, "arrays": ["start", "values"], "answers": "brpo"},
    {"estimator": {"kind": "progress_gae", "gamma": 0.5}, "arrays": ["start"], "answers": "brpo"},
    {"estimator": {"kind": "progress_gae", "gamma": 0.0}, "arrays": ["start", "scored"], "answers": "grpo"},
]


def expected(case):
    arrays = {name: np.asarray(INPUTS[name]) for name in case["arrays"]}
    result = oracles.assign(
        INPUTS["correct"],
        INPUTS["forks"],
        oracles.prior_weights(TOKENS, PRIOR),
        answers=case["answers"],
        **case["estimator"],
        **arrays,
    )
    return {name: None if array is None else array.tolist() for name, array in result.items()}


def build():
    return {
        "provenance": (
            "Written by tests/core/make_golden.py from tests/core/oracles.py: float64 loops over the equations of "
            "arXiv 2505.13438 (BRPO) and arXiv 2503.07572 (MRT). Not the output of the library or of released code."
        ),
        "configuration": {"tokens": TOKENS, "prior": PRIOR, "shape": {"B": 2, "G": 2, "S": 3, "A": 2, "A0": 2}},
        "inputs": INPUTS,
        "cases": [dict(case, expected=expected(case)) for case in CASES],
    }


def dumps(value, indent=0):
    """JSON with one array a line: short enough to read, long enough to compare by eye."""
    if isinstance(value, dict):
        pad = "  " * (indent + 1)
        body = ",\n".join(f"{pad}{json.dumps(key)}: {dumps(item, indent + 1)}" for key, item in value.items())
        return "{\n" + body + "\n" + "  " * indent + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        pad = "  " * (indent + 1)
        return "[\n" + ",\n".join(pad + dumps(item, indent + 1) for item in value) + "\n" + "  " * indent + "]"
    return json.dumps(value)


if __name__ == "__main__":
    PATH.write_text(dumps(build()) + "\n")
