"""Who decodes and crops, on which host."""

import os

import pytest

from isd_tf.data import looks
from isd_tf.views import python_crops


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux' affinity")
def test_of_many_cores_those_count_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert looks.cores.__wrapped__() <= len(allowed)  # A container may have a quota of fewer.
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert looks.cores.__wrapped__() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("resizer, who", [(True, "cykooz_resizer"), (False, "graph")])
def test_python_crops_where_it_can(resizer, who, monkeypatch):
    """Under Linux on ARM there is no resizer."""
    monkeypatch.setattr(python_crops, "cykooz_resizer", object() if resizer else None)
    assert looks.random_crops_by() == who
