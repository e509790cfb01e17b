from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import Golden


def test_a_text_is_compared_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    Golden(update=False, directory=tmp_path)("a", "one\ntwo")
    with pytest.raises(pytest.fail.Exception, match=r"-two\n\+three"):
        Golden(update=False, directory=tmp_path)("a", "one\nthree")


def test_an_update_writes_and_never_counts_as_a_pass(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"a\.txt is written"):
        Golden(update=True, directory=tmp_path)("a", "one")
    assert (tmp_path / "a.txt").read_text() == "one\n"


def test_a_missing_file_fails(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"a\.txt is not there: run pytest --update-golden"):
        Golden(update=False, directory=tmp_path)("a", "one")
