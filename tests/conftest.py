"""One JAX for all tests: eight virtual CPU devices, elastic runs' thread pool, one compilation cache.

Marks as `core` what also runs on the second Python of continuous integration: all but the tests named here
and those marked `slow` or `once`.
"""

import os
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# as `backend.use_huge_pages` leaves it: a test that runs a program's main in this process must not start it anew
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))

from nanollama.parallel import backend

# no clock and no dice: a busy machine or an unlucky draw is no failure of the code
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

# Tests of files, texts and pages, which know nothing of the Python or JAX they run on.
NOT_CORE = {"test_docs", "test_report", "test_quickstart"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem not in NOT_CORE and not any(map(item.get_closest_marker, ("slow", "once"))):
            item.add_marker(pytest.mark.core)


backend.start(elastic=True, devices=8)
