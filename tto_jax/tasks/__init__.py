"""Tasks that come with the library, by name; and the strings around problems of other sources."""

import dataclasses

from tto_jax.tasks.chain import Chain
from tto_jax.tasks.peak import Peak
from tto_jax.tasks.problem import SPLITS, Demonstration, EmbeddedTask, Problem, Task, Verdict, prompt_id, split_of

__all__ = [
    "SPLITS",
    "Chain",
    "Demonstration",
    "EmbeddedTask",
    "Peak",
    "Problem",
    "Task",
    "Verdict",
    "get",
    "prompt_id",
    "split_of",
]

_TASKS = {cls.name: cls for cls in (Peak, Chain)}


def get(name: str, **fields) -> EmbeddedTask:
    """The task called `name`, with the given fields in place of its defaults."""
    if name not in _TASKS:
        raise ValueError(f"task {name!r} is unknown; the choices are {', '.join(_TASKS)}")
    known = [field.name for field in dataclasses.fields(_TASKS[name])]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"task {name!r} has no field {', '.join(unknown)}; the choices are {', '.join(known)}")
    return _TASKS[name](**fields)
