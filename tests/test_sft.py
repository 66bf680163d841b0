"""The page of supervised fine-tuning: it learns, resumes, exports, and refuses what cannot work."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath
from test_math_path import MODEL, model_dir  # noqa: F401

from configs import sft as configuration
from tto_jax import learner, metrics, pretrained, sft

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sums whose answer is boxed; held out are others."""
    folder = tmp_path_factory.mktemp("chats")
    for name, numbers in (("train", range(4)), ("held_out", (4, 5))):
        records = [
            {
                "messages": [{"role": "user", "content": f"{a} + {b}"}],
                "prefix": " so ",
                "suffix": f"</think> Answer \\boxed{{{(a + b) % 6}}}",
            }
            for a in numbers
            for b in range(6)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config_of(model_dir, files, **changes):  # noqa: F811
    config = configuration.get_config()
    given = {
        "init": str(model_dir),
        "data.train": (str(files / "train.jsonl"),),
        "data.eval": (str(files / "held_out.jsonl"),),
        "mesh": (1, 1, 1),
        "model.dtype": "float32",
        "model.remat": "none",
        "row_length": 32,
        "steps": 6,
        "learner.rows": 4,
        "learner.optimizer.learning_rate": 1e-2,
        "learner.optimizer.schedule": "constant",
        "evaluation.every": 3,
        "checkpoint.every": 3,
    }
    for name, value in (given | {name.replace("__", "."): value for name, value in changes.items()}).items():
        config.update_from_flattened_dict({name: value})
    return config


def run(workdir, config):
    tokenizer, plan = sft.build(config)
    train, held_out = (sft.read(config.data[name], tokenizer, plan.row_length) for name in ("train", "eval"))
    sft.fit(config, plan, train, held_out, epath.Path(workdir))
    return metrics.read_rows(workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_dir, files):  # noqa: F811
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(workdir, config_of(model_dir, files))


def test_it_learns_and_says_so(whole):
    _, rows = whole
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    assert rows[-1]["loss/total"] < rows[1]["loss/total"]
    assert all(row["tokens/trained"] + row["tokens/padding"] < 4 * 32 for row in rows[1:])


def test_a_resumed_run_is_the_same_run(whole, tmp_path, monkeypatch, model_dir, files):  # noqa: F811
    config, step = config_of(model_dir, files), learner.supervised_step

    def dying(*arguments):
        if int(arguments[3].step) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner, "supervised_step", dying)
        run(tmp_path / "run", config)
    rows = run(tmp_path / "run", config)
    assert rows == whole[1]
    params = [pretrained.find(path).load(MODEL) for path in (whole[0], tmp_path / "run")]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_other_data_than_the_cursor_means(whole, tmp_path, model_dir, files):  # noqa: F811
    changed = tmp_path / "train.jsonl"
    changed.write_text((files / "train.jsonl").read_text().replace(" so ", " wait "))
    config = config_of(model_dir, files, data__train=(str(changed),))
    run(tmp_path / "run", config)
    changed.write_text((files / "train.jsonl").read_text())
    with pytest.raises(ValueError, match="have changed since step 6"):
        run(tmp_path / "run", config)


def test_a_mesh_gives_the_same_run(whole, tmp_path, model_dir, files):  # noqa: F811
    rows = run(tmp_path / "run", config_of(model_dir, files, mesh=(1, 4, 2)))
    for a, b in zip(rows, whole[1], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init": ""}, "init is empty"),
        ({"data__train": ()}, "data.train is empty"),
        ({"learner__micro_tokens": -1}, "micro_tokens=-1"),
        ({"row_length": 65}, "max_position=64"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_refused_before_any_work(model_dir, files, change, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        sft.build(config_of(model_dir, files, **change))


def test_rows_that_a_mesh_cannot_split(tmp_path, model_dir, files):  # noqa: F811
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        run(tmp_path / "run", config_of(model_dir, files, mesh=(1, 8, 1)))
