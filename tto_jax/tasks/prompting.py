"""The texts around a problem and its answer: instruction, end of thinking, what elicits an answer, what is graded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prompting:
    """All strings of an experiment on texts. They are tokenized as they stand; inserted ones are never trained on."""

    instruction: str  # appended to the problem, inside the user's turn
    system: str  # the system's turn; empty: none
    think_start: str  # appended to the rendered prompt, for chat templates that do not open the thinking themselves
    think_end: str  # ends thinking; one token of the tokenizer
    elicit_ended: str  # inserted before an answer if the trace has ended thinking; may be empty
    elicit_cut: str  # inserted before an answer if the trace is cut
    paragraph: str  # only the first paragraph of insertion and answer that starts so is graded; empty: all of it


_INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."

STYLES = {
    # AnytimeReasoner, 2505.13438 and its released code.
    "anytime": Prompting(
        instruction=_INSTRUCTION,
        system="",
        think_start="",
        think_end="</think>",
        elicit_ended="\n\n**Final Answer**\n",
        elicit_cut="...\n\n...\n\n</think>\n\n**Final Answer**\n",
        paragraph="**Final Answer**\n",
    ),
    # MRT, 2503.07572: the meta-prover's string; a trace that has ended thinking answers by itself.
    "mrt": Prompting(
        instruction=_INSTRUCTION,
        system="",
        think_start="",
        think_end="</think>",
        elicit_ended="",
        elicit_cut="Time is up.\n\nGiven the time I've spent and the approaches I've tried, I should stop thinking and "
        "formulate a final answer based on what I already have.\n</think>\n\n**Step-by-Step Explanation and Answer:**"
        "\n\n1. **",
        paragraph="",
    ),
}


def style(name: str, **changes: str) -> Prompting:
    """The prompting called `name`, with the given strings in place of its own.

    Raises ValueError for an unknown name or string, and where a cut trace would not be told to end its thinking.
    """
    if name not in STYLES:
        raise ValueError(f"prompting style {name!r} is unknown; the choices are {', '.join(STYLES)}")
    known = [field.name for field in dataclasses.fields(Prompting)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"prompting has no string {', '.join(unknown)}; the choices are {', '.join(known)}")
    found = dataclasses.replace(STYLES[name], **changes)
    if not found.think_end or found.elicit_cut.count(found.think_end) != 1:
        raise ValueError(
            f"elicit_cut={found.elicit_cut!r} must hold think_end={found.think_end!r} exactly once: answers of cut "
            "traces are well-formed only then"
        )
    if found.think_end in found.elicit_ended:
        raise ValueError(
            f"elicit_ended={found.elicit_ended!r} holds think_end={found.think_end!r}: the trace has it already, and "
            "answers after two of them are not well-formed"
        )
    for name in ("elicit_ended", "elicit_cut") if found.paragraph else ():
        if not getattr(found, name).endswith(found.paragraph):
            raise ValueError(
                f"{name}={getattr(found, name)!r} must end with paragraph={found.paragraph!r}, which starts what is "
                "graded; or set paragraph to the empty string"
            )
    return found
