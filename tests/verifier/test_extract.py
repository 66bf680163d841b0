"""What is graded of a text: paragraphs and boxes, against a slow oracle, and in linear time."""

import random
import time

import pytest

from tto_jax.verifier.extract import graded_text, last_boxed

MARKER = "**Final Answer**\n"


def test_first_paragraph_with_the_marker_is_graded():
    text = f"so it is 4\n\n{MARKER}\\boxed{{5}}\nindeed\n\n{MARKER}\\boxed{{6}}"
    assert graded_text(text, MARKER) == f"{MARKER}\\boxed{{5}}\nindeed"
    assert graded_text(f"{MARKER}7", MARKER) == f"{MARKER}7"


@pytest.mark.parametrize(
    "text",
    [
        "no marker",
        f"in a line {MARKER}5",
        f"after one newline\n{MARKER}5",
        "**Final Answer**\n\n\\boxed{5}",  # an empty line after the marker: its paragraph has no newline
        "x\n\n\n**Final Answer**\n5",  # split from the left, the paragraph begins with a newline
        "**final answer**\n5",
        "",
    ],
)
def test_anything_else_is_not(text):
    assert graded_text(text, MARKER) is None


def test_no_marker_grades_the_whole_text():
    assert graded_text("a\n\nb", "") == "a\n\nb"
    assert graded_text("", "") == ""


def test_marker_with_an_empty_line_is_refused():
    with pytest.raises(ValueError, match="empty line"):
        graded_text("x", "Answer\n\n")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{4} or \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{a \\} {", r"a \\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed 5", "5"),
        (r"$\boxed 5$ is it", "5"),
        ("\\boxed 5\nand more", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{5} and \fbox{6}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{5} \boxedness{6}", "5"),
        (r"\boxed{4} and \boxed{5", None),  # the last box decides, and it is not finished
        (r"\boxed{5 \}", None),
        (r"\boxed", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_box(text, content):
    assert last_boxed(text) == content


def oracle(text: str) -> str | None:
    """Reads the text forwards, character by character, all boxes at once."""
    boxes, i = [], 0
    while i < len(text):
        if text.startswith("\\boxed{", i):
            boxes.append([i + 7, None, 1])
            i += 7
            continue
        step = 2 if text[i] == "\\" else 1
        if text[i] in "{}":
            for box in boxes:
                if box[1] is None:
                    box[2] += 1 if text[i] == "{" else -1
                    box[1] = i if box[2] == 0 else None
        i += step
    if not boxes:
        return None
    start, end, _ = boxes[-1]
    return None if end is None else text[start:end].strip()


def test_boxes_against_an_oracle():
    rng = random.Random(0)
    pieces = ["\\boxed{", "{", "}", "\\{", "\\}", "\\\\", "5", " ", "\n"]
    for _ in range(5_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(16)))
        assert last_boxed(text) == oracle(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "\\boxedx" * 150_000,
        "\\boxed{" + "{" * 500_000 + "}" * 500_000,
        "\\boxed{" + "9" * 1_000_000 + "}",
        "\n\n" * 500_000,
        "\\" * 1_000_000,
    ],
)
def test_megabytes_take_linear_time(text):
    began = time.process_time()
    last_boxed(text)
    graded_text(text, MARKER)
    assert time.process_time() - began < 2.0
