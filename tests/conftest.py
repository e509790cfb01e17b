from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def workers() -> Iterator[Pool]:
    """Up to four gloo processes: `workers.run(world_size, fn, *args)` gives what each rank returned."""
    pool = Pool()
    yield pool
    pool.close()
