"""What part of a model's text is graded. Linear in the text: answers may be megabytes of anything."""

import re

_BOX = ("\\boxed", "\\fbox")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def graded_text(text: str, paragraph: str) -> str | None:
    r"""The first paragraph that starts with `paragraph`, or None; all of `text` where `paragraph` is empty.

    Paragraphs are what lies between occurrences of "\n\n", read from the left. With "**Final Answer**\n", as in
    arXiv 2505.13438, a marker that is followed by an empty line is a paragraph without its newline: it does not count.

    Raises:
        ValueError: if `paragraph` holds "\n\n", which no paragraph does.
    """
    if "\n\n" in paragraph:
        raise ValueError(f"paragraph={paragraph!r} must not hold an empty line: paragraphs are split there")
    if not paragraph:
        return text
    return next((part for part in text.split("\n\n") if part.startswith(paragraph)), None)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`; of the last `\fbox{...}` where nothing is boxed; None if there is none.

    The last box decides, as in the released evaluators: if it is not closed there is no answer, though earlier boxes
    may be (an answer that hit its cap had not been finished). Braces nest; `\{` and `\}` are characters. In the form
    `\boxed 5` the content ends at the next `$` or line break.
    """
    for command in _BOX:
        start = _last_command(text, command)
        if start is not None:
            return _content(text, start)
    return None


def _last_command(text: str, command: str) -> int | None:
    """Index after the last `command` that no letter follows."""
    end = len(text)
    while (found := text.rfind(command, 0, end)) >= 0:
        after = found + len(command)
        if not text[after : after + 1].isalpha():
            return after
        end = after - 1
    return None


def _content(text: str, start: int) -> str | None:
    if not re.compile(r"\s*\{").match(text, start):
        bare = re.compile(r"[^\n$]*").match(text, start)
        return bare.group().strip() or None
    depth, opened = 0, text.index("{", start)
    for token in _BRACES.finditer(text, opened):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[opened + 1 : token.start()].strip()
    return None
