from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.golden import UPDATE, Golden
from tests.pool import Pool

# What tests measure of this machine is theirs alone. Before any worker starts, so that they inherit it.
CACHE = tempfile.TemporaryDirectory(prefix="whalepy-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

# A busy machine is no reason to fail.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(UPDATE, action="store_true", help="write the texts in tests/golden anew; those tests are skipped")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)`: the text is that of tests/golden/name.txt."""
    return Golden(update=bool(request.config.getoption(UPDATE)))


@pytest.fixture(scope="session")
def workers() -> Iterator[Pool]:
    """Up to four gloo processes: `workers.run(world_size, fn, *args)` gives what each rank returned."""
    pool = Pool()
    yield pool
    pool.close()
