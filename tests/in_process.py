"""Runs of experiments/run.py in the test's own process."""

import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import run  # noqa: E402
import settings_checks  # noqa: E402


def set_flags(*arguments):
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    settings_checks.read(["run.py", *map(str, arguments)])


def call(*arguments):
    """Runs main() in this process with the given flags only."""
    set_flags(*arguments)
    run.main()
