"""Runs pytest on its arguments: the main program of every py_test in BUILD."""

import os
import sys

import pytest

if __name__ == "__main__":
    # For tests that start experiments/run.py: rules_python gives its import paths to no child.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # A runfiles tree may be read-only, so pytest gets no cache in it.
    # The slow tests too: some files have no others.
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-m", "", *sys.argv[1:]]))
