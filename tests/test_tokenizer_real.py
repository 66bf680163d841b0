"""Tokenizers of pretrained models: a real one with its chat template, and made ones that lack something."""

import dataclasses
import json

import pytest
import tokenizers
import transformers

from tto_jax.tasks import prompting
from tto_jax.tokenizer import Tokenizer

ANYTIME, MRT = prompting.style("anytime"), prompting.style("mrt")
QUESTION = "What is $1+1$?"


@pytest.fixture(scope="module")
def real(real_data):
    return Tokenizer.from_pretrained(real_data / "tokenizers" / "deepseek-r1", ANYTIME)


def test_ids_are_read_from_the_tokenizer(real, real_data):
    listed = json.loads((real_data / "tokenizers" / "deepseek-r1" / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in listed["added_tokens"]}
    assert real.think_end_id == added["</think>"]
    assert real.eos_id == real.pad_id == added[real.hf.eos_token], "pad equals EOS: masks come from lengths"
    assert real.vocab_size == max(max(added.values()), max(listed["model"]["vocab"].values())) + 1


def test_insertions_of_the_paper_have_its_token_counts(real):
    assert len(real.elicit_ended) == 5 and len(real.elicit_cut) == 3 + 5
    assert real.elicit_cut[3:] == real.elicit_ended and real.elicit_cut.count(real.think_end_id) == 1
    assert real.decode(real.elicit_cut) == ANYTIME.elicit_cut
    mrt = dataclasses.replace(MRT, system="Be brief.")
    other = Tokenizer.from_pretrained(real.hf.name_or_path, mrt)
    assert other.elicit_ended == () and other.decode(other.elicit_cut) == MRT.elicit_cut
    assert "Be brief." in other.render_prompt(QUESTION)


def test_prompts_are_the_chat_template_around_problem_and_instruction(real):
    turns = [{"role": "user", "content": QUESTION + ANYTIME.instruction}]
    expected = real.hf.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert real.render_prompt(QUESTION) == expected and expected.count(QUESTION + ANYTIME.instruction) == 1
    ids = real.encode_prompt(QUESTION)
    assert ids == real.hf.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids.count(real.hf.bos_token_id) == 1, "the template holds the BOS: the tokenizer must not add another"
    assert real.encode_prompts([QUESTION, "x"]) == [ids, real.encode_prompt("x")] and real.encode_prompts([]) == []


def test_thinking_is_opened_where_the_template_does_not(real):
    opened = Tokenizer.from_pretrained(real.hf.name_or_path, dataclasses.replace(ANYTIME, think_start="<think>\n"))
    assert opened.render_prompt(QUESTION) == real.render_prompt(QUESTION) + "<think>\n"
    assert opened.decode(opened.encode_prompt(QUESTION)).endswith("<think>\n")


def test_decoding_keeps_every_token(real):
    text = "<think>\nso  2 .\n\n</think>\n\n\\boxed{½ · 数}" + real.hf.eos_token
    assert real.decode(real.encode(text)) == text
    assert real.batch_decode([[], real.encode("a b")]) == ["", "a b"]
    assert real.decode([real.vocab_size + 100]) == "", "rows of the model beyond the tokenizer have no text"


def test_a_think_end_of_several_tokens_is_refused(real):
    with pytest.raises(ValueError, match=r"think_end='</reflect>' is \d tokens \[.*must end with one"):
        chat = prompting.style("mrt", think_end="</reflect>", elicit_cut="</reflect>")
        Tokenizer.from_pretrained(real.hf.name_or_path, chat)


def test_another_think_end_that_is_one_token_works(real):
    chat = prompting.style("mrt", think_end=" END", elicit_cut=" END\n")
    assert Tokenizer.from_pretrained(real.hf.name_or_path, chat).think_end_id == real.encode(" END")[0]


def test_the_tokenizer_is_the_files_whatever_the_model(real, real_data, tmp_path):
    """Beside the config.json of a Qwen2 model too, whose own tokenizer splits numbers otherwise."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real_data / "tokenizers" / "deepseek-r1" / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    text = "12345 + ½ · 数 \n\n  x"
    assert Tokenizer.from_pretrained(tmp_path, ANYTIME).encode(text) == real.encode(text)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode(text, add_special_tokens=False).ids == real.encode(text)


def made(folder, *, words=("a", "</think>", "<end>"), eos="<end>", template="{{ messages[0]['content'] }}"):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(("?", *words))}, "?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?", eos_token=eos)
    hf.chat_template = template
    hf.save_pretrained(folder)
    return folder


def test_without_a_pad_token_the_eos_pads(tmp_path):
    found = Tokenizer.from_pretrained(made(tmp_path), MRT)
    assert found.hf.pad_token_id is None and found.pad_id == found.eos_id == found.hf.convert_tokens_to_ids("<end>")


@pytest.mark.parametrize(
    ("lacking", "said"),
    [({"eos": None}, "no EOS token"), ({"template": None}, "no chat template")],
    ids=["eos", "template"],
)
def test_what_a_tokenizer_must_have(tmp_path, lacking, said):
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_pretrained(made(tmp_path, **lacking), MRT)


def test_a_think_end_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"think_end='</think>'.*unknown"):
        Tokenizer.from_pretrained(made(tmp_path, words=("a", "<end>")), MRT)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer could be read from {tmp_path}"):
        Tokenizer.from_pretrained(tmp_path, MRT)
