"""The settings know the package's names without importing it; here both are compared."""

import inspect
import pathlib
import sys

import pytest
from absl import flags

from isd_tf.data import pixels
from isd_tf.evaluation import linear, transfer
from isd_tf.networks import backbones, encoders, heads, torch_weights
from isd_tf.serving import formats
from isd_tf.training import distribution, initial_weights
from isd_tf.views import augment

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import evaluations  # noqa: E402
import run  # noqa: E402
import settings  # noqa: E402
import settings_checks  # noqa: E402
from in_process import set_flags  # noqa: E402
from small_runs import RANDOM_TEACHER  # noqa: E402

RECIPES = sorted(path.name for path in EXPERIMENTS.glob("*.flags"))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (settings.VIEWS, augment.RECIPES),
        (settings.ARCHITECTURES, encoders.ARCHITECTURES),
        (settings.APPLICATIONS, backbones.APPLICATIONS),
        (settings.HEADS, heads.HEADS),
        (settings.METHODS, run.METHODS),
        (settings.STRATEGIES, distribution.STRATEGIES),
        (settings.EVALUATIONS, evaluations.EVALUATIONS),
        (settings.PICKLES, torch_weights.PICKLES),
        (settings.WEIGHTS_SUFFIXES, initial_weights.SUFFIXES),
        (settings.EXPORT_FORMATS, run.EXPORTS),
        (settings.KERAS_HUB_ENCODERS, formats.KERAS_HUB_ENCODERS),
        ([settings.LARGEST_SMALL_IMAGE], [encoders.LARGEST_SMALL_IMAGE]),
        ([settings.KERAS_HUB_WIDTH], [formats.KERAS_HUB_WIDTH]),
        (settings.TRANSFER, transfer.PAPER_TASKS),
        (settings.FEW_LABELS_LEARNING_RATES, linear.FEW_LABELS_LEARNING_RATES),
        (settings.FEW_LABELS_WEIGHT_DECAYS, linear.FEW_LABELS_WEIGHT_DECAYS),
        ([settings.LINEAR_EPOCHS], [linear.EPOCHS]),
        ([settings.MAX_PIXELS], [pixels.MAX_PIXELS]),
    ],
)
def test_names_and_defaults_are_the_packages(ours, theirs):
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("method", settings.METHODS)
def test_a_methods_flags_are_its_arguments(method):
    arguments = inspect.signature(run.METHODS[method]).parameters
    assert set(settings.METHODS[method]) <= set(arguments)
    of_others = {name for names in settings.METHODS.values() for name in names}
    assert not (of_others - set(settings.METHODS[method])) & set(arguments)


@pytest.mark.parametrize(
    "name", [*transfer.PAPER_TASKS, "sun397/standard-part1-120k", "svhn_cropped", "folder:a/b"]
)
def test_a_transfer_task_has_the_packages_source_and_name(name):
    assert settings.transfer_source(name) == transfer.task_of(name).source
    assert settings.transfer_name(name) == transfer.score_name(name)


def test_every_whole_number_has_a_range_and_every_name_a_flag():
    own = {flag.name: flag for flag in settings.own_flags()}
    numbers = {name for name, flag in own.items() if isinstance(flag.parser, flags.IntegerParser)}
    assert numbers <= set(settings_checks.RANGES) <= set(own)
    for names in (settings.NOT_RECIPE, settings.MACHINES_OWN, settings_checks.REQUIRED):
        assert set(names) <= set(own)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shipped_flag_file_says_nothing_of_its_nested_ones(recipe, capsys):
    """byol.flags nests imagenet.flags, whose temperatures are another method's."""
    teacher = RANDOM_TEACHER if "compress" in recipe else []
    set_flags(f"--flagfile={recipe}", "--data_dir=x", *teacher)
    assert capsys.readouterr().out == ""
    if settings.FLAGS.method == "byol":
        set_flags(f"--flagfile={recipe}", "--data_dir=x", "--temperature=1", "--queue_size", "9")
        said = "Of no effect with --method=byol: --queue_size, --temperature.\n"
        assert capsys.readouterr().out == said
