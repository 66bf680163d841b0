"""What an experiment takes from outside: the task, the model to start from, its tokenizer, and the problems."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from tto_jax import data, pretrained, problem_sets, sharding, tasks
from tto_jax.math_task import MathTask
from tto_jax.models import hf_weights
from tto_jax.models.config import ModelConfig
from tto_jax.models.decoder import Params
from tto_jax.tasks import Problem, Task, prompting
from tto_jax.tasks.prompting import Prompting
from tto_jax.tokenizer import Tokenizer
from tto_jax.verifier.pool import Pool


def is_pretrained(config: ml_collections.ConfigDict) -> bool:
    """Whether the policy starts from a pretrained model, which `init` names, and not from a warm start."""
    return "init" in config


def resolve(config: ml_collections.ConfigDict, need_model: bool) -> tuple[Task, Tokenizer, ModelConfig]:
    """Task, tokenizer and model of a configuration. Raises ValueError for what cannot work together.

    need_model=False: the model that `init` should name may be absent, if the configuration gives all its sizes.
    """
    if is_pretrained(config):
        return _resolve_pretrained(config, need_model)
    task = tasks.get(**config.task.to_dict())
    tokenizer = Tokenizer.from_task(task)
    return task, tokenizer, ModelConfig(vocab_size=tokenizer.vocab_size, **config.model.to_dict())


def _resolve_pretrained(config, need_model):
    wanted, chat = config.task, prompting_of(config.task)
    limits = wanted.verifier.to_dict()
    verifier = Pool(limits.pop("workers") or None, **limits)
    task = MathTask(chat, wanted.max_prompt_tokens, wanted.max_answer_tokens, verifier)
    given = {name: value for name, value in config.model.to_dict().items() if value is not None}
    if config.init:
        return task, *pretrained_model(config.init, given, chat)
    if need_model:
        raise ValueError(
            "init is empty: name the model to start from, a Hugging Face directory or a converted checkpoint, "
            "such as --config.init=models/DeepSeek-R1-Distill-Qwen-1.5B"
        )
    return task, Tokenizer.absent(chat, wanted.elicit_tokens), _given_model(given)


def prompting_of(config: ml_collections.ConfigDict) -> Prompting:
    """The strings that a section with `prompting` names: a style, and what is given in place of its own."""
    strings = {name: text for name, text in config.prompting.to_dict().items() if text is not None}
    return prompting.style(strings.pop("style"), **strings)


def pretrained_model(path: str, given: dict[str, Any], chat: Prompting) -> tuple[Tokenizer, ModelConfig]:
    """Tokenizer and model of a directory; what the configuration gives of the model must be so there."""
    start = pretrained.find(path)
    model = start.model_config(dtype=given.pop("dtype"), remat=given.pop("remat"))
    wanted = dataclasses.replace(model, **given)
    differ = [
        f"{name}: {path} has {getattr(model, name)!r}, you gave {getattr(wanted, name)!r}"
        for name in given
        if getattr(model, name) != getattr(wanted, name)
    ]
    if differ:
        raise ValueError("init is another model than the configuration says:\n  " + "\n  ".join(differ))
    tokenizer = Tokenizer.from_pretrained(start.tokenizer_dir, chat)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer in {start.tokenizer_dir} has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{model.vocab_size}: they belong to different models"
        )
    return tokenizer, model


def _given_model(given):
    try:
        return ModelConfig(**given)
    except TypeError as error:
        raise ValueError(f"init is empty and model does not give every size ({error}): give --config.init") from error


def pretrained_params(
    config: ml_collections.ConfigDict, model: ModelConfig, workdir: epath.Path, mesh: jax.sharding.Mesh | None
) -> Params:
    """The pretrained parameters on the mesh; the workdir gets the model's small files: it can be exported by itself."""
    start = pretrained.find(config.init)
    if jax.process_index() == 0:
        pretrained.copy_small_files(start, workdir / "hf")
    if mesh is None:
        return start.load(model)
    return start.load(model, sharding.shardings(mesh, hf_weights.abstract_params(model), model.num_kv_heads))


@dataclasses.dataclass(frozen=True)
class FittingProblems:
    """Problems whose prompts fit, and how many do not."""

    problems: Sequence[Problem]
    dropped: int
    fingerprint: str = ""  # of the set's contents; empty for tasks that make their problems


def training_problems(config: ml_collections.ConfigDict, task: Task, tokenizer: Tokenizer) -> FittingProblems:
    """The training problems."""
    if not is_pretrained(config):
        return FittingProblems(data.ProblemSource(task, "train", config.data.problems), 0)
    if not config.data.train:
        raise ValueError("data.train is empty: name a set made by `python -m tto_jax.prepare_data`")
    return _fitting(config.data.train, task, tokenizer)


def evaluation_problems(
    config: ml_collections.ConfigDict, task: Task, tokenizer: Tokenizer, count: int
) -> dict[str, FittingProblems]:
    """The first `count` problems of every evaluation set, by the set's name; no sets if count is 0."""
    if not count:
        return {}
    if not is_pretrained(config):
        return {task.name: FittingProblems(data.ProblemSource(task, "eval", count), 0)}
    found = {}
    for path in config.data.eval:
        name = problem_sets.open_set(path).name
        if name in found:
            raise ValueError(
                f"data.eval={tuple(config.data.eval)} has two sets named {name!r}: prepare one with --name"
            )
        fitting = _fitting(path, task, tokenizer)
        first = [fitting.problems[i] for i in range(min(count, len(fitting.problems)))]
        found[name] = dataclasses.replace(fitting, problems=first)
    return found


def _fitting(path, task, tokenizer):
    source = problem_sets.open_set(path)
    return FittingProblems(*data.drop_overlong(source, tokenizer, task.max_prompt_tokens), source.fingerprint)
