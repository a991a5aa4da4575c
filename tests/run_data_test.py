import pathlib
import shutil
import sys

import numpy as np

import isd_tf
from isd_tf.data.datasets import ArrayDataset

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import run_data  # noqa: E402


def images(*labels, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4, 3), np.uint8)
    names = tuple(f"a\nclass {label}" for label in range(max(labels) + 1))
    return ArrayDataset(f"images {seed}", values, np.array(labels), names)


def test_one_class_is_not_scored_and_a_class_that_only_tests_is_named_as_text():
    def reason(train, test):
        return run_data.reason_not_to_score(run_data.Data(train, train, test))

    assert reason(images(0, 1), images(1)) is None
    assert (
        reason(images(0, 0), images(0)) == "images 0 has one class: there is nothing to tell apart."
    )
    assert "1 classes of images 1 have no images in images 0, a\\nclass 2 first." == reason(
        images(0, 1), images(2, seed=1)
    )


def test_test_images_that_are_training_images_too_are_said(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    train, test = isd_tf.datasets.load("folder", data_dir=str(folder))
    assert run_data._say_shared_images(train, test) == 0 and not capsys.readouterr().out
    shutil.copy(folder / "train/dark/3.png", folder / "val/light/2.png")
    assert run_data._say_shared_images(train, test) == 1
    assert capsys.readouterr().out == (
        f"1 of the 8 images of {folder}/val are also in {folder}/train, so that scores are too "
        f"high: {folder}/val/light/2.png\n"
    )
    assert run_data._say_shared_images(images(0, 1), images(0, 1)) == 2
    assert "images 0, so that scores are too high: image 0, image 1\n" in capsys.readouterr().out


def test_that_images_are_not_compared_is_said_and_nothing_recorded(photos, capsys):
    train, _ = isd_tf.datasets.load("folder", data_dir=str(photos))
    found = run_data.shared_images("transfer_x_", [train, images(0)], images(0, 1))
    assert not found
    assert f"Not compared: whether images of images 0 are also in {photos}/train, which" in (
        capsys.readouterr().out
    )
    found = run_data.shared_images("transfer_x_", [images(0), images(0, 1)], images(0, 1))
    assert found == {"transfer_x_test_images_in_train": 3}
