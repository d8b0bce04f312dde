"""Prompts longer than the model: refused, skipped, or cut in their text and nowhere else."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.backends.echo import EchoBackend
from batchinfer.errors import JobError
from batchinfer.request import Completion, Request
from tests.data.test_prompt import CHATML, characters, error, ids, render, renderer, write_tokenizer
from tests.echo_jobs import echo_job, read_output, run_echo, tokenizer_dir, write

pytestmark = pytest.mark.usefixtures("demo_tokenizer")
SIDES = ("truncate_left", "truncate_right")


def letters(folder, **section):
    """Prompts whose tokens are letters, in a model of 40 tokens that answers with 6."""
    return renderer(folder, sampling={"max_tokens": 6}, max_seq_len=40, chat="off", template="{{ t }}", **section)


def test_error_is_the_default_and_skip_is_no_failure():
    folder = tokenizer_dir()
    fits, refused = render(letters(folder), {"t": ["a" * 39, "b" * 40]})
    assert len(ids(fits)) == 39 and fits.sampling.max_tokens == 1
    assert "40 tokens, and at most 39 fit" in error(refused) and not refused.skipped
    bad, skipped = render(letters(folder, on_overlong="skip"), {"t": ["", "b" * 40]})
    assert not bad.skipped and skipped.skipped and skipped.error == refused.error and skipped.prompt_tokens == 40


def test_a_monstrous_cell_is_skipped_or_cut_like_any_other():
    made = letters(tokenizer_dir(), on_overlong="skip")
    [result] = render(made, {"t": ["a" * (made._max_characters + 1)]})
    assert result.skipped and "characters" in result.error
    made = letters(tokenizer_dir(), on_overlong="truncate_left")
    [result] = render(made, {"t": ["a" * made._max_characters + "bc"]})
    assert len(ids(result)) == 34 and ids(result)[-2:] == ids(render(made, {"t": ["bc"]})[0])


@pytest.mark.parametrize("side", SIDES)
def test_a_plain_prompt_keeps_one_end_and_room_for_its_answer(side):
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    whole, cut = render(letters(tokenizer_dir(), on_overlong=side), {"t": [text[:34], text]})
    wanted = text[-34:] if side == "truncate_left" else text[:34]
    assert ids(cut) == ids(render(letters(tokenizer_dir()), {"t": [wanted]})[0])
    assert len(ids(whole)) == 34 and whole.sampling.max_tokens == cut.sampling.max_tokens == 6


def test_the_room_kept_is_max_tokens_of_the_row_and_a_quarter_of_the_sequence_at_most():
    sampling = {"max_tokens": 1000, "columns": {"max_tokens": "n"}}
    made = renderer(tokenizer_dir(), sampling=sampling, max_seq_len=40, template="{{ t }}", on_overlong=SIDES[0])
    results = render(made, {"t": ["a" * 40] * 3, "n": [2, 9, None]})
    assert [len(ids(r)) for r in results] == [38, 31, 30]


def test_what_the_tokenizer_puts_around_a_prompt_stays(tmp_path):
    folder = write_tokenizer(tmp_path / "unigram", characters(), bos_token="<s>")
    [cut] = render(letters(folder, on_overlong="truncate_left"), {"t": ["abc" * 30]})
    assert ids(cut)[0] == 0 and len(ids(cut)) == 34


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("messages", [False, True])
def test_in_a_chat_the_last_user_message_is_cut_and_all_else_is_whole(
    demo_tokenizer, demo_tokenizer_dir, side, messages
):
    words = [f"word{i}" for i in range(400)]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " ".join(words)},
        {"role": "assistant", "content": "I was"},
    ]
    options = {"sampling": {"max_tokens": 20}, "max_seq_len": 200, "on_overlong": side}
    if messages:
        [cut] = render(renderer(demo_tokenizer_dir, messages="m", **options), {"m": [json.dumps(chat)]})
    else:
        made = renderer(demo_tokenizer_dir, template="{{ t }}", system="Be brief.", **options)
        [cut] = render(made, {"t": [chat[1]["content"]]})
    said = demo_tokenizer._tokenizer.decode(ids(cut), skip_special_tokens=False)
    for spelled in demo_tokenizer.specials.values():
        said = said.replace(spelled, "|")
    head, _, rest = said.partition("Be brief.|\n|user\n")
    assert head == "|system\n"
    kept, _, tail = rest.partition("|\n|assistant\n")
    assert tail == ("I was|\n|assistant\n" if messages else "")
    whole = " ".join(words)
    assert whole.endswith(kept) if side == "truncate_left" else whole.startswith(kept)
    assert 177 <= len(ids(cut)) <= 180 and cut.sampling.max_tokens == 20


def test_content_in_parts_is_cut_in_its_last_text(tmp_path):
    parts = CHATML.replace("m.content", "m.content | map(attribute='text') | join")
    tokenizer = characters(("<|im_start|>", "<|im_end|>", "<unk>"))
    folder = write_tokenizer(tmp_path / "parts", tokenizer, parts)
    made = renderer(folder, sampling={"max_tokens": 6}, max_seq_len=80, messages="m", on_overlong="truncate_right")
    content = [{"type": "text", "text": "abc"}, {"type": "text", "text": "def" * 50}]
    [cut] = render(made, {"m": [json.dumps([{"role": "user", "content": content}])]})
    assert 70 <= len(ids(cut)) <= 74


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": "s" * 300}, {"role": "user", "content": "short"}],
        [{"role": "user", "content": "x" * 300}, {"role": "user", "content": "z"}],
        [{"role": "assistant", "content": "x" * 300}],
    ],
)
def test_a_row_that_cannot_be_cut_enough_is_an_error(tmp_path, chat):
    tokenizer = characters(("<|im_start|>", "<|im_end|>", "<unk>"))
    folder = write_tokenizer(tmp_path / "chat", tokenizer, CHATML)
    made = renderer(folder, max_seq_len=100, messages="m", on_overlong="truncate_left")
    [refused] = render(made, {"m": [json.dumps(chat)]})
    assert "75 may stay, and its last user message has only" in error(refused) and not refused.skipped


@settings(max_examples=80, deadline=None)
@given(st.text(min_size=1, max_size=300).filter(str.strip), st.integers(24, 60), st.sampled_from(SIDES))
def test_any_text_fits_or_says_why(demo_tokenizer_dir, text, length, side):
    options = {"sampling": {"max_tokens": 4}, "max_seq_len": length, "on_overlong": side}
    made = renderer(demo_tokenizer_dir, template="{{ t }}", **options)
    [result] = render(made, {"t": [text]})
    if isinstance(result, Request):
        assert len(result.prompt_token_ids) <= length - 4 and result.sampling.max_tokens == 4
    else:
        assert isinstance(result, Completion) and "may stay" in result.error


def test_no_cut_splits_a_control_token_that_the_template_writes(demo_tokenizer_dir):
    made = renderer(
        demo_tokenizer_dir, template="<|im_start|>" * 30 + "{{ t }}", chat="off", max_seq_len=20,
        sampling={"max_tokens": 2}, on_overlong="truncate_right",
    )  # fmt: skip
    [cut] = render(made, {"t": ["tail"]})
    assert len(ids(cut)) == 18 and len(set(ids(cut))) == 1


@pytest.mark.parametrize("n", [1, 3])
def test_a_skipped_row_is_counted_apart_from_failures(tmp_path, n):
    write(tmp_path / "in.parquet", pa.table({"text": ["good", None, "x" * 99, "x" * 98]}))
    job = echo_job(tmp_path, prompt__on_overlong="skip", sampling__n=n, limits__max_failed_fraction=0.3)
    summary = run_echo(job, lambda folder: EchoBackend(folder, max_seq_len=64))
    rows = read_output(tmp_path).to_pylist()
    reasons = ["stop", "error", "skipped", "skipped"] if n == 1 else [["stop"] * n, ["error"], ["skipped"], ["skipped"]]
    assert [row["finish_reason"] for row in rows] == reasons
    assert rows[2]["completion"] is None and rows[2]["completion_tokens"] is None and "103 tokens" in rows[2]["error"]
    assert (summary.job.failed, summary.job.skipped, summary.exit_code) == (1, 2, 0)
    assert str(summary).startswith("4 rows (1 failed, 2 skipped)")
    assert {"ok": 1, "failed": 1, "skipped": 2}.items() <= summary.as_dict()["job"].items()
    assert run_echo(job).job.skipped == 2


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(JobError, match="prompt.on_overlong.*'truncate_left'.*got 'cut'"):
        echo_job(tmp_path, prompt__on_overlong="cut")
