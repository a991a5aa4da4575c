import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from isd_tf.data.datasets import ArrayDataset
from isd_tf.evaluation import linear, transfer
from isd_tf.evaluation.features import Features

VALUES = (1e-3, 1.0, 1e6)


def dataset(labels, seed, scale=1.0):
    """Images of one pixel that are features around their class' axis."""
    random = np.random.default_rng(seed)
    values = 2 * np.eye(3)[labels] + scale * random.normal(size=(len(labels), 3))
    images = values.astype(np.float32)[:, np.newaxis, np.newaxis]
    return ArrayDataset("points", images, labels, ("a", "b", "c"))


def features_of(part):
    return Features(part.images[:, 0, 0], part.labels)


def splits():
    # Unequal classes, so that the two metrics differ.
    labels = np.repeat([0, 1, 2], [60, 20, 10])
    return transfer.Splits(dataset(labels, 0), dataset(labels, 1), dataset(labels, 2))


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_l2_is_chosen_on_validation_fitted_to_both_and_scored_on_test(metric):
    parts = splits()
    score = transfer.evaluate(parts, features_of, metric, VALUES)

    def accuracy(fitted_to, l2, scored_on):
        classifiers = linear.fit(fitted_to, [l2])
        x = classifiers.logits(scored_on.images[:, 0, 0])[0].argmax(axis=1)
        right = x == scored_on.labels
        classes = [right[scored_on.labels == label].mean() for label in range(3)]
        return right.mean() if metric == "top1" else np.mean(classes)

    training, validation = map(features_of, parts[:2])
    tried = [accuracy(training, l2, parts.validation) for l2 in VALUES]
    np.testing.assert_allclose([score.validation[l2] for l2 in VALUES], tried, atol=0.02)
    assert score.validation[score.l2] == max(score.validation.values())
    both = Features(
        *(np.concatenate(pair) for pair in zip(training[:2], validation[:2], strict=True))
    )
    assert score.accuracy == pytest.approx(accuracy(both, score.l2, parts.test), abs=1e-9)


def test_of_equally_good_values_the_largest_is_taken():
    labels = np.repeat([0, 1, 2], 20)
    parts = [dataset(labels, seed, scale=0.01) for seed in range(3)]
    score = transfer.evaluate(transfer.Splits(*parts), features_of, "top1", (1e-3, 0.1, 1e-2))
    assert score.l2 == 0.1 and score.accuracy == 1.0


def test_the_grid_is_the_published_one():
    assert len(transfer.L2_VALUES) == 45
    ratios = np.diff(np.log10(transfer.L2_VALUES))
    np.testing.assert_allclose(ratios, 11 / 44)
    assert (transfer.L2_VALUES[0], transfer.L2_VALUES[-1]) == (1e-6, 1e5)


def test_the_papers_nine_datasets_exist_in_tfds_and_have_their_metrics():
    assert len(transfer.PAPER_TASKS) == 9
    per_class = {n for n, task in transfer.PAPER_TASKS.items() if task.metric == "mean_per_class"}
    assert per_class == {"pets", "caltech101", "flowers102"}
    known = tfds.list_builders(with_community_datasets=False)
    for task in transfer.PAPER_TASKS.values():
        name, _, config = task.source.partition("/")
        assert name in known
        if config:
            assert config in tfds.builder_cls(name).builder_configs
        features = tfds.builder(task.source).info.features
        kinds = [type(feature) for feature in features.values()]
        assert tfds.features.Image in kinds and tfds.features.ClassLabel in kinds


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten training images and two test images."""
    for split, count in (("train", 10), ("test", 2)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


def test_a_folder_is_a_task_whose_validation_split_is_held_out(folder):
    parts = transfer.load(transfer.task_of(f"folder:{folder}"), None, seed=0)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[8, 8], [2, 2], [2, 2]]
    assert not set(parts.training.paths) & set(parts.validation.paths)
    # Of few that are held out one unreadable image would be too many.
    assert [part.whole for part in parts] == [20, 20, None]
    again = transfer.load(transfer.task_of(f"folder:{folder}"), None, seed=1)
    assert set(again.validation.paths) != set(parts.validation.paths)


def test_a_validation_split_of_its_own_is_used(monkeypatch):
    opened = []

    def load(name, train_split, test_split, data_dir):
        opened.append((name, train_split, test_split, data_dir))
        return dataset(np.arange(9) % 3, 0), dataset(np.arange(6) % 3, len(opened))

    monkeypatch.setattr(transfer.datasets, "load", load)
    parts = transfer.load(transfer.PAPER_TASKS["dtd"], "place", seed=0)
    assert opened == [("dtd", "train", None, "place"), ("dtd", "train", "validation", "place")]
    assert len(parts.training) == 9 and len(parts.validation) == 6
    # TFDS has Food101's test images under the name of validation.
    transfer.load(transfer.PAPER_TASKS["food101"], None, seed=0)
    assert opened[2:] == [("food101", "train", "validation", None)]


def test_what_has_no_test_images_or_labels_is_refused(folder, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    (folder / "train").rename(bare / "train")
    with pytest.raises(ValueError, match="has no test images to score"):
        transfer.load(transfer.task_of(f"folder:{bare}"), None, 0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        transfer.load(transfer.task_of("folder:nowhere"), None, 0)
    with pytest.raises(ValueError, match="Unknown dataset"):
        transfer.load(transfer.task_of("food102"), None, 0)
