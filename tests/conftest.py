from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.golden import UPDATE, Golden
from tests.pool import Pool


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
