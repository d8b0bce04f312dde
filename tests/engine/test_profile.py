"""What an engine is built for: defaults, contradictions, and what a job's rows make of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from batchinfer.engine.profile import Profile, Sample, Shape, fit, in_order, limits
from batchinfer.errors import ModelError

WHOLE = Profile.of({}, "cpu", 8192)


def test_a_number_is_the_most_and_the_rest_is_chosen():
    made = Profile.of({"batch_size": 64, "seq_len": {"opt": 100, "max": 300}}, "cpu", 8192)
    assert made == Profile(64, 320, 300, opt=Shape(64, 320, 100), min=Shape(1, 1, 1))
    assert WHOLE.seq_len == 8192 and WHOLE.opt.seq_len == 128, "memory is for sequences as they usually are"
    assert Profile.of({}, "cuda", 2048) == Profile(1024, 8192, 2048)


def test_a_step_has_room_for_a_token_of_every_sequence():
    assert Profile.of({"batch_size": 700}, "cpu", 8192).step_tokens == 700


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seq_len": 9000}, "seq_len is 9000, more than the 8192 positions"),
        ({"seq_len": {"opt": 600, "max": 300}}, "seq_len must have min ≤ opt ≤ max, got min 1, opt 600, max 300"),
        ({"batch_size": {"min": 300, "opt": 20}}, "batch_size must have min ≤ opt"),
        ({"step_tokens": {"opt": -2}}, "step_tokens.opt must be 0 .* got -2"),
    ],
)
def test_numbers_that_contradict_are_named(asked, message):
    with pytest.raises(ModelError, match=f"engine.profile.{message}"):
        Profile.of(asked, "cpu", 8192)


def test_a_profile_is_read_as_it_was_written():
    assert Profile.from_dict(json.loads(json.dumps(asdict(WHOLE)))) == WHOLE


def test_a_plan_is_asked_only_for_what_is_said():
    assert WHOLE.differs({"batch_size": 0, "seq_len": {"min": 0, "opt": 128, "max": 8192}}) is None
    assert WHOLE.differs({"seq_len": 256}) == "seq_len 8192, not 256"
    assert WHOLE.differs({"batch_size": {"opt": 7}}) == "batch_size.opt 128, not 7"


def test_limits_are_the_most_that_any_profile_has():
    profiles = in_order([WHOLE, Profile(256, 256, 64)])
    assert [profile.seq_len for profile in profiles] == [64, 8192]
    assert limits(profiles) == Shape(256, 320, 8192)


def test_short_rows_make_a_narrow_profile_with_more_of_them_beside_the_whole_one():
    narrow, whole = fit(WHOLE, Sample(prompts=(20, 40, 60), completions=(30, 30, 30)))
    assert whole == WHOLE
    assert narrow.seq_len == 96 and narrow.opt.seq_len == 70 and narrow.min.seq_len == 50
    assert narrow.batch_size == 224 == narrow.opt.batch_size
    assert narrow.opt.step_tokens == min(320, -(-224 * 70 // 30))


def test_rows_as_long_as_the_model_takes_leave_one_profile_with_its_limits():
    [only] = fit(WHOLE, Sample(prompts=(8000, 100), completions=(500, 20)))
    assert replace(only, opt=WHOLE.opt, min=WHOLE.min) == WHOLE and only.opt.seq_len == (8192 + 120) // 2


def test_rows_that_are_refused_anyway_do_not_count_and_with_none_left_there_is_nothing_to_fit():
    narrow, _ = fit(WHOLE, Sample(prompts=(100_000, 40), completions=(10, 10)))
    assert narrow.seq_len == 64
    with pytest.raises(ModelError, match="2 rows looked at, none of them a prompt of fewer than 8192 tokens"):
        fit(WHOLE, Sample((9000, 8192), (1, 1)))
