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


@pytest.mark.parametrize(
    "cores, in_service, resizer, who",
    [
        (1, False, True, "cykooz_resizer"),
        (looks.GRAPH_CORES - 1, False, True, "cykooz_resizer"),
        (looks.GRAPH_CORES, False, True, "graph"),
        (1, True, True, "graph"),
        (1, False, False, "graph"),
    ],
)
def test_hosts_with_few_cores_crop_in_python_where_they_can(
    cores, in_service, resizer, who, monkeypatch
):
    """A data service's workers run graphs only; under Linux on ARM there is no resizer."""
    monkeypatch.setattr(looks, "cores", lambda: cores)
    monkeypatch.setattr(python_crops, "cykooz_resizer", object() if resizer else None)
    assert looks.random_crops_by(in_service) == who
