import dataclasses

import pytest

from tto_jax.tasks import prompting


def test_anytime_is_the_papers():
    found = prompting.style("anytime")
    assert found.elicit_ended == "\n\n**Final Answer**\n" and found.paragraph == "**Final Answer**\n"
    assert found.elicit_cut == "...\n\n...\n\n</think>" + found.elicit_ended
    assert found.instruction == " Let's think step by step and output the final answer within \\boxed{}."


def test_mrt_is_the_papers():
    found = prompting.style("mrt")
    assert found.elicit_ended == "" and found.paragraph == ""
    assert found.elicit_cut.startswith(
        "Time is up.\n\nGiven the time I've spent and the approaches I've tried, I should"
    )
    assert found.elicit_cut.endswith("already have.\n</think>\n\n**Step-by-Step Explanation and Answer:**\n\n1. **")


def test_any_string_can_be_given():
    found = prompting.style(
        "anytime", think_end="</thought>", elicit_cut="\n</thought>\nAnswer: ", elicit_ended="", paragraph=""
    )
    assert dataclasses.asdict(found) | {"system": "s"} == dataclasses.asdict(dataclasses.replace(found, system="s"))
    assert found.elicit_cut == "\n</thought>\nAnswer: "


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("anytme", {}, "'anytme' is unknown; the choices are anytime, mrt"),
        ("mrt", {"elicit": "x"}, "no string elicit; the choices are instruction"),
        ("anytime", {"elicit_cut": "**Final Answer**\n"}, "must hold think_end='</think>' exactly once"),
        ("anytime", {"elicit_cut": "</think></think>**Final Answer**\n"}, "exactly once"),
        ("mrt", {"think_end": ""}, "exactly once"),
        ("mrt", {"elicit_ended": "</think>\n"}, "the trace has it already"),
        ("anytime", {"elicit_ended": "\nAnswer: "}, "must end with paragraph"),
        ("anytime", {"paragraph": "**Answer**\n"}, "must end with paragraph"),
    ],
)
def test_strings_that_cannot_work_are_refused(name, changes, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*").replace("(", r"\(")):
        prompting.style(name, **changes)
