from __future__ import annotations

from whalepy.hardware.near import did_you_mean, either, near_words


def test_near_words_ignore_case_and_stop_at_three() -> None:
    assert near_words("T5", ("T4", "A10")) == ()
    assert near_words("speeed", ("Speed", "type")) == ("Speed",)
    assert len(near_words("aaaa", ("aaab", "aaac", "aaad", "aaae"))) == 3


def test_did_you_mean_lists_all_when_nothing_is_near() -> None:
    assert did_you_mean("spede", ("speed", "type")) == "did you mean speed?"
    assert did_you_mean("xyz", ("speed", "type")) == "known: speed, type"


def test_either() -> None:
    assert [either(names) for names in (("a",), ("a", "b"), ("a", "b", "c"))] == ["a", "a or b", "a, b or c"]
