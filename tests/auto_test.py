"""The rules behind `auto`, on their own and in runs of experiments/run.py."""

import json
import shutil
import sys

import pytest
import tensorflow as tf
from absl import flags
from small_runs import ROOT, newest_weights, small_run

sys.path.insert(0, str(ROOT / "experiments"))

import auto  # noqa: E402
import finetune_settings  # noqa: E402
import run  # noqa: E402
import settings  # noqa: E402
import workdirs  # noqa: E402
from in_process import call, set_flags  # noqa: E402

AUTO = ["--queue_size=auto", "--epochs=auto", "--learning_rate=auto"]


@pytest.mark.parametrize("images", [2, 3, 300, 1000, 1023, 1024, 10_800, 60_000, 200_000, 255_999])
def test_a_queue_is_a_power_of_two_of_a_quarter_to_half_of_the_images(images):
    size, _ = auto.queue_size(images, batch_size=1)
    assert bin(size).count("1") == 1
    assert images / 4 < size <= images / 2


@pytest.mark.parametrize(
    ("images", "batch_size", "size"),
    [
        (300, 64, 128),
        (300_000, 64, 128_000),
        (1_281_167, 256, 128_000),  # The paper's.
        (262_143, 64, 65_536),
        (262_144, 64, 128_000),
        (100, 64, 64),
        (256, 256, 256),
        (1, 1, 1),
    ],
)
def test_a_queue_holds_the_batch_and_at_most_the_papers(images, batch_size, size):
    assert auto.queue_size(images, batch_size)[0] == size


def test_the_fewer_images_the_more_epochs_within_bounds():
    numbers = [auto.epochs(images)[0] for images in (10, 200, 300, 700, 999, 1000, 10**6)]
    assert numbers == [1000, 1000, 667, 286, 201, 200, 200]
    for images in (300, 700, 999):  # And not an epoch more than it takes.
        seen = auto.epochs(images)[0] * images
        assert auto.IMAGES_SEEN <= seen < auto.IMAGES_SEEN + images


def recipe_of(name):
    set_flags(f"--flagfile={name}", "--data_dir=x")
    return settings.FLAGS


@pytest.mark.parametrize("name", ["imagenet.flags", "moco_v2.flags", "byol.flags", "msf.flags"])
def test_the_rate_is_that_of_the_papers_recipe_at_its_batch(name):
    recipe = recipe_of(name)
    rate = recipe.learning_rate
    assert auto.learning_rate(recipe.method, recipe.batch_size, 1_281_167)[0] == rate
    assert auto.learning_rate(recipe.method, 1024, 10**5)[0] == pytest.approx(4 * rate)
    assert auto.learning_rate(recipe.method, 64, 99_999)[0] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("images", "queue", "epochs", "every", "rate"),
    [(300, 128, 667, 33, 0.05), (300_000, 128_000, 200, 10, 0.0125)],
)
def test_folder_flags_suit_any_number_of_images(images, queue, epochs, every, rate):
    recipe = recipe_of("folder.flags")
    chosen = run.choose_settings(tf.distribute.get_strategy(), range(images))
    assert (recipe.queue_size, recipe.epochs, recipe.knn_every_epochs) == (queue, epochs, every)
    assert (recipe.learning_rate, recipe.batch_size) == (rate, 64)
    assert [text.partition(":")[0] for text in chosen] == [
        f"--queue_size={queue}",
        f"--epochs={epochs}",
        f"--learning_rate={rate}",
    ]


@pytest.mark.parametrize("value", ["autoo", "Auto", "", "1.5", "auto,auto"])
def test_another_word_is_refused(value):
    with pytest.raises(flags.IllegalFlagValueError, match="expected an integer, or auto"):
        set_flags("--flagfile=quickstart.flags", f"--queue_size={value}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs=0"], "--epochs must be at least 1"),
        (["--learning_rate=0"], "--learning_rate must be positive"),
        (["--batch_size=auto"], "--batch_size=auto"),
        (
            ["--epochs=auto", "--learning_rate_schedule=drops", "--drop_epochs=3"],
            "--epochs=auto with --learning_rate_schedule=drops",
        ),
        (["--stages=plan,pretrain"], "Pass --stages=plan alone"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises((ValueError, flags.Error), match=message):
        set_flags("--flagfile=quickstart.flags", *arguments)


def test_more_neighbors_than_the_queue_that_was_found_are_refused():
    set_flags("--flagfile=quickstart_msf.flags", "--queue_size=auto", "--neighbors=200")
    with pytest.raises(ValueError, match="--neighbors must be at most --queue_size=128"):
        run.choose_settings(tf.distribute.get_strategy(), range(300))


def test_a_method_without_a_queue_finds_none(capsys):
    set_flags("--flagfile=quickstart_byol.flags", "--queue_size=auto")
    assert "Of no effect with --method=byol: --queue_size.\n" in capsys.readouterr().out
    assert run.choose_settings(tf.distribute.get_strategy(), range(300)) == []
    assert settings.FLAGS.queue_size is None


def test_finetuning_has_no_auto():
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    arguments = ["--encoder=tiny_resnet", "--dataset=photo_patches", "--workdir=x"]
    with pytest.raises(ValueError, match="auto is run.py's. Received: --epochs=auto"):
        finetune_settings.read(["finetune.py", *arguments, "--epochs=auto"])


@pytest.fixture
def two_epochs(monkeypatch):
    """Rules by which 24 images need two epochs."""
    monkeypatch.setattr(auto, "IMAGES_SEEN", 48)
    monkeypatch.setattr(auto, "FEWEST_EPOCHS", 1)


@pytest.mark.slow
def test_a_run_keeps_the_numbers_that_it_has_found(
    photos, tmp_path, two_epochs, monkeypatch, capsys
):
    arguments = [*small_run(photos, tmp_path), *AUTO, "--knn_every_epochs=0", "--stages=pretrain"]
    call(*arguments)
    output = capsys.readouterr().out
    assert "--queue_size=8: the largest power of two of at most half of 24 images.\n" in output
    assert "24 images are few" in output
    name, weights = newest_weights(tmp_path)
    assert name == "step-00000012"
    assert weights["model/queue/rows/.ATTRIBUTES/VARIABLE_VALUE"].shape == (8, 4)
    found = {"queue_size": "8", "epochs": "2", "learning_rate": "0.003125"}
    assert {name: workdirs.flag(tmp_path, name) for name in found} == found
    assert "auto" not in (tmp_path / "run.flags").read_text().replace("--strategy=auto", "")

    # Of another version of the rules, say.
    monkeypatch.setattr(auto, "IMAGES_SEEN", 100)
    monkeypatch.setattr(auto, "LARGEST_QUEUE", 4)
    call(*arguments)
    output = capsys.readouterr().out
    assert "--epochs=2: as the run was begun" in output and "is complete" in output
    call(*small_run(photos, tmp_path), *AUTO, "--stages=evaluate,export")
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 12
    assert (tmp_path / "saved_model" / "1").is_dir()
    call(*small_run(photos, tmp_path), *AUTO, "--stages=export")
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    shutil.copy(more / "train/dark/3.png", more / "train/dark/extra.png")
    with pytest.raises(ValueError, match="begun with other images: 24 then, 25 of"):
        call(*arguments, f"--data_dir={more}")


def test_an_export_alone_of_nothing_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        call(*small_run(photos, tmp_path), *AUTO, "--stages=export")
