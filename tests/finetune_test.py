"""experiments/finetune.py as it is called, on folders of a few small images."""

import json
import os
import re
import shutil

import in_process  # noqa: F401 - puts experiments/ on the path
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags
from PIL import Image
from small_models import softmax
from small_runs import ROOT, assert_same_end, newest_weights, read_csv

import isd_tf
from isd_tf.data import datasets, photo_patches, subsets
from isd_tf.finetuning.classifier import Classifier
from isd_tf.training import checkpoints as checkpointing

import finetune  # isort: skip
import finetune_settings  # isort: skip

SMALL = (
    *("--dataset=folder", "--encoder=tiny_resnet", "--width=4", "--image_size=16"),
    *("--batch_size=4", "--epochs=3", "--checkpoint_every_steps=3", "--learning_rate=0.02"),
    "--patience=3",
)
STEPS = 18 // 4 * 3  # Of 24 images, 3 of each of two classes are held out.


def read_flags(*arguments):
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
    finetune_settings.read(["finetune.py", *map(str, arguments)])


def call(*arguments):
    """Runs main() in this process with the given flags only."""
    read_flags(*arguments)
    finetune.main()


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A folder as `photos`, in which there is nothing to learn: no classifier is right."""
    folder, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for name in ("heads", "tails"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                values = random.integers(0, 256, (4, 4, 3), np.uint8)
                image = Image.fromarray(values).resize((20, 20), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{i}.png")
    return folder


def let_an_epoch_be_best(patch):
    """Whatever the epochs make of noise, the first (0, linear) and the last of them are worse."""
    keep_if_better = Classifier.keep_if_better

    def keep_if_better_in_between(model, epoch, score):
        worse = 99.0 if epoch in (0, 3) else 0.0
        keep_if_better(model, epoch, score._replace(loss=score.loss + worse))

    patch.setattr(Classifier, "keep_if_better", keep_if_better_in_between)


@pytest.fixture(scope="module")
def whole(noise, tmp_path_factory):
    """A workdir, and the classifier that was exported there."""
    workdir, exported = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        let_an_epoch_be_best(patch)
        export = finetune.export
        patch.setattr(finetune, "export", lambda *x: exported.append(x[1]) or export(*x))
        call(*SMALL, f"--data_dir={noise}", f"--workdir={workdir}")
    return workdir, exported[0]


@pytest.fixture
def no_export(monkeypatch):
    """Leaves out what takes seconds and is another test's."""
    monkeypatch.setattr(finetune, "export", lambda *_: None)


class KilledError(Exception):
    pass


def kill_at(step, monkeypatch):
    def die(self, batch, logs=None):
        if int(self.model.step.numpy()) == step:
            raise KilledError

    monkeypatch.setattr(finetune.finetuning.KeepBest, "on_train_batch_end", die)


# ------------------------------------------------------------------------------ what comes out


@pytest.mark.slow
def test_a_run_killed_twice_ends_in_the_bits_of_an_uninterrupted_one(
    whole, noise, tmp_path, no_export, monkeypatch, capsys
):
    let_an_epoch_be_best(monkeypatch)
    arguments = (*SMALL, f"--data_dir={noise}", f"--workdir={tmp_path}")
    for step in (6, 11):  # The last checkpoints before are those of the steps 4 and 9.
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
            kill_at(step, patch)
            call(*arguments)
    call(*arguments)
    assert f"Continuing {tmp_path} after step 9" in capsys.readouterr().out
    assert_same_end(tmp_path, whole[0])
    assert newest_weights(tmp_path)[0] == f"step-{STEPS:08d}"
    assert results_of(tmp_path) == results_of(whole[0])
    for name in ("per_class.csv", "confusion.csv", "linear.json", "dataset.json"):
        assert (tmp_path / name).read_text() == (whole[0] / name).read_text()
    assert 0 < results_of(tmp_path)["best_epoch"] < 3  # So it was remembered.
    # Once more: there is nothing to train, and the result is the same.
    call(*arguments)
    assert results_of(tmp_path) == results_of(whole[0])


def test_tables_and_classify_are_those_of_the_exported_model(whole, noise):
    workdir, model = whole
    serve = tf.saved_model.load(str(workdir / "saved_model" / "1")).signatures["classify"]
    _, test = isd_tf.datasets.load("folder", data_dir=str(noise))
    served = serve(image_bytes=tf.stack([tf.io.read_file(path) for path in test.paths]))
    ((views, labels),) = isd_tf.evaluation_batches(test, 16, 16)
    logits = model(views, training=False).numpy()
    np.testing.assert_allclose(served["scores"], softmax(logits), atol=1e-4)
    assert served["classes"].numpy().tolist() == [[b"heads", b"tails"]] * 16
    # The tables, from what the SavedModel says.
    predictions = served["scores"].numpy().argmax(axis=1)
    names = [os.path.basename(os.path.dirname(path)) for path in test.paths]
    assert [("heads", "tails")[label] for label in labels] == names
    rows = read_csv(workdir / "confusion.csv")
    assert rows[0][1:] == ["heads", "tails"]
    for true, row in zip(("heads", "tails"), rows[1:], strict=True):
        own = predictions[np.array(names) == true]
        assert row == [true, str((own == 0).sum()), str((own == 1).sum())]
    rows = read_csv(workdir / "per_class.csv")
    for i, row in enumerate(rows[1:]):
        assert row[:2] == [("heads", "tails")[i], "8"]
        assert float(row[2]) == pytest.approx(np.mean(predictions[labels == i] == i))
    results = results_of(workdir)
    assert results["top1"] == pytest.approx(np.mean(predictions == labels))
    assert "top5" not in results and results["step"] == STEPS
    card = json.loads((workdir / "saved_model" / "1" / "model_card.json").read_text())
    assert card["classes"] == ["heads", "tails"] and card["scores"] == results
    assert "--encoder=tiny_resnet" in card["recipe"]


def test_the_held_out_part_is_stratified_and_disjoint(photos):
    read_flags(*SMALL, f"--data_dir={photos}", "--workdir=x", "--label_fraction=0.8")
    data = finetune.load_data()
    train, _ = isd_tf.datasets.load("folder", data_dir=str(photos))
    few = subsets.take(train, subsets.rows_of_fraction(train, 0.8, 0), "80%")
    assert not set(data.fit.paths) & set(data.held_out.paths)
    assert {*data.fit.paths, *data.held_out.paths} == set(few.paths)
    # A fifth of the 10 of each class.
    assert np.bincount(data.held_out.labels).tolist() == [2, 2]
    assert np.bincount(data.fit.labels).tolist() == [8, 8]
    np.testing.assert_array_equal(data.weights, [1, 1])


def test_unbalanced_labels_are_weighted_unless_told_not_to(photos, tmp_path, monkeypatch):
    for image in sorted((photos / "train" / "light").iterdir())[:4]:
        (tmp_path / "train" / "light").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "train" / "light")
    shutil.copytree(photos / "train" / "dark", tmp_path / "train" / "dark")
    arguments = (*SMALL, f"--data_dir={tmp_path}", "--workdir=x")
    given = []
    monkeypatch.setattr(
        finetune.checkpointing, "fit_from_step", lambda *_, **given_: given.append(given_)
    )
    read_flags(*arguments)
    data = finetune.load_data()
    # Of 12 and 4 images, 3 and 1 are held out.
    np.testing.assert_allclose(data.weights, [12 / 18, 12 / 6])
    encoder, size, _ = finetune.load_encoder(tf.distribute.get_strategy())
    model = finetune.build_model(tf.distribute.get_strategy(), encoder, data)
    checkpoints = checkpointing.Checkpoints(tmp_path / "checkpoints", model)
    finetune.train(finetune.Run(data, size, tmp_path, []), model, checkpoints, 0)
    assert given[0]["class_weight"] == {0: pytest.approx(12 / 18), 1: pytest.approx(12 / 6)}
    read_flags(*arguments, "--class_weights=none")
    np.testing.assert_array_equal(finetune.load_data().weights, [1, 1])


# -------------------------------------------------------------------------- where it begins from


def weights_of(encoder):
    return [weight.numpy() for weight in encoder.weights]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a pretraining, with its student in files as well, and its weights."""
    workdir = tmp_path_factory.mktemp("pretrained")
    keras.utils.set_random_seed(7)
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    model = isd_tf.ISD(encoder, *isd_tf.isd_heads(16), queue_size=8)
    model.compile(isd_tf.TorchSGD(0.1))
    checkpointing.Checkpoints(workdir / "checkpoints", model).save()
    (workdir / "run.flags").write_text("--encoder=tiny_resnet\n--image_size=16\n--width=4\n")
    encoder.save(workdir / "encoder.keras")
    encoder.save_weights(workdir / "encoder.weights.h5")
    return workdir, weights_of(encoder)


@pytest.mark.parametrize(
    ("encoder", "more"),
    [
        ("", []),
        ("encoder.keras", []),
        ("encoder.weights.h5", ["--architecture=tiny_resnet", "--width=4", "--image_size=16"]),
    ],
)
def test_a_pretrained_encoder_begins_with_its_weights(encoder, more, pretrained, photos, capsys):
    workdir, expected = pretrained
    read_flags("--dataset=folder", f"--encoder={workdir / encoder}", "--workdir=x", *more)
    loaded, size, initial = finetune.load_encoder(tf.distribute.get_strategy())
    assert size == 16 and initial["path"] == str(workdir / encoder)
    for ours, theirs in zip(weights_of(loaded), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    said = capsys.readouterr().out
    assert str(workdir) in said and "random" not in said


def test_random_weights_are_said_to_be_random(capsys):
    read_flags(*SMALL, "--workdir=x")
    encoder, _, initial = finetune.load_encoder(tf.distribute.get_strategy())
    assert initial == {} and encoder.count_params() > 0
    assert "tiny_resnet, from scratch: its weights are random" in capsys.readouterr().out


def test_the_encoder_stays_as_it_is_without_epochs(pretrained, photos, tmp_path, monkeypatch):
    workdir, expected = pretrained
    exported = []
    monkeypatch.setattr(finetune, "export", lambda run, model: exported.append(model.encoder))
    arguments = ("--dataset=folder", f"--data_dir={photos}", "--batch_size=4", "--epochs=0")
    call(*arguments, f"--encoder={workdir}", f"--workdir={tmp_path}")
    for ours, theirs in zip(weights_of(exported[0]), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    results = results_of(tmp_path)
    assert results["best_epoch"] == 0 and results["top1"] == results["linear_top1"]
    assert results["held_out_accuracy"] == results["linear_held_out_accuracy"]
    # There is no checkpoint, but there are results: of this recipe.
    with pytest.raises(ValueError, match="another recipe: --batch_size=4 then, --batch_size=2 now"):
        call(*arguments, "--batch_size=2", f"--encoder={workdir}", f"--workdir={tmp_path}")


def test_a_linear_score_of_other_test_images_is_left_out(photos, tmp_path, no_export, capsys):
    shutil.copytree(photos / "train", tmp_path / "photos" / "train")
    arguments = (*SMALL, f"--data_dir={tmp_path / 'photos'}", f"--workdir={tmp_path / 'run'}")
    call(*arguments)
    shutil.copytree(photos / "val", tmp_path / "photos" / "val")
    capsys.readouterr()
    call(*arguments)
    output, results = capsys.readouterr().out, results_of(tmp_path / "run")
    assert "scored on other test images, or on none: left out" in output
    assert "frozen, linear" not in output and "finetuned" in output
    assert 0 <= results["top1"] <= 1 and "linear_top1" not in results
    assert 0 <= results["linear_held_out_accuracy"] <= 1


def test_a_list_has_no_test_images_and_is_scored_on_those_held_out(
    photos, tmp_path, no_export, capsys
):
    lines = [
        f"{split}/{name}/{i}.png\t{name}\n"
        for split in ("train",)
        for name in ("dark", "light")
        for i in range(12)
    ]
    (tmp_path / "list.txt").write_text("".join(lines))
    call(
        *SMALL, "--dataset=list", f"--image_list={tmp_path / 'list.txt'}", f"--data_dir={photos}",
        f"--workdir={tmp_path / 'run'}", "--epochs=0",
    )  # fmt: skip
    assert (
        "There are no test images. The tables are about the 6 held-out" in capsys.readouterr().out
    )
    assert "top1" not in results_of(tmp_path / "run")
    rows = read_csv(tmp_path / "run" / "per_class.csv")
    assert [row[1] for row in rows[1:]] == ["3", "3"]


@pytest.mark.slow
def test_two_devices_train(noise, tmp_path, two_replicas, monkeypatch, no_export, capsys):
    """That they take the same steps as one is finetuning_test.py's."""
    monkeypatch.setattr(finetune, "choose_devices", lambda: two_replicas)
    call(*SMALL, f"--data_dir={noise}", f"--workdir={tmp_path}", "--epochs=1")
    assert results_of(tmp_path)["step"] == STEPS // 3
    assert "Epoch 1/1: loss" in capsys.readouterr().out


# ---------------------------------------------------------------------------- what good weights do


@pytest.mark.slow
def test_good_weights_beat_random_ones_on_few_labels(tmp_path, no_export, monkeypatch):
    """The good ones are planted: of a training with labels, of other images."""
    splits = [photo_patches.make_patches(split) for split in ("train", "test")]
    few = [
        datasets.ArrayDataset(f"every {n}th", x[::n], y[::n], photo_patches.CLASS_NAMES)
        for n, (x, y) in zip((50, 5), splits, strict=True)
    ]
    monkeypatch.setattr(isd_tf.datasets, "load", lambda *_: few)
    images, labels = (values[1::5] for values in splits[0])
    keras.utils.set_random_seed(0)
    encoder = isd_tf.build_encoder("tiny_resnet", 32, 8)
    model = keras.Sequential([encoder, keras.layers.Dense(18)])
    model.compile(
        isd_tf.TorchSGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    views = isd_tf.augment.evaluation_view(tf.constant(images), 32)
    model.fit(views, labels, 32, epochs=3, verbose=0)
    encoder.save(tmp_path / "good.keras")
    common = ("--dataset=photo_patches", "--epochs=5")
    call(*common, f"--encoder={tmp_path / 'good.keras'}", f"--workdir={tmp_path / 'good'}")
    scratch = ("--encoder=tiny_resnet", "--width=8", "--image_size=32")
    call(*common, *scratch, f"--workdir={tmp_path / 'scratch'}")
    good, random = (results_of(tmp_path / name)["top1"] for name in ("good", "scratch"))
    assert good > random + 0.1, (good, random)


# ------------------------------------------------------------------------------------- bad input


def test_a_score_that_fails_does_not_take_the_export_along(monkeypatch, capsys):
    def fail(run, model):
        raise KeyError("x")

    done = []
    monkeypatch.setattr(finetune, "score", fail)
    monkeypatch.setattr(finetune, "export", lambda run, model: done.append(run))
    run = finetune.Run(None, 16, None, [])
    with pytest.raises(ValueError, match="^The scoring failed: KeyError: 'x'$"):
        finetune.finish(run, None)
    assert done == [run] and "The scoring failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label_fraction=0.01"], "Every class needs a labelled image.*Use at least"),
        (["--label_fraction=0.05"], "some class needs two. Received: one of each of the 2"),
        (["--batch_size=19"], "--batch_size=19 for 18 of the 24 images.*the other 6 are held out"),
        (["--dataset=folder", "--data_dir={0}/unlabelled"], "unlabelled has no labels"),
        (["--dataset=folder", "--data_dir={0}/one"], "has one class: there is nothing to tell"),
        (["--dataset=folder", "--data_dir={0}/other"], "classes without: new"),
        (["--encoder={0}/empty.keras"], "empty.keras cannot be read as a Keras model"),
        (["--encoder={0}/nan.weights.h5", "--architecture=tiny_resnet"], "are not finite"),
        (["--encoder={0}/dense.weights.h5", "--architecture=tiny_resnet"], "another network's"),
        (["--encoder={0}/text.safetensors", "--architecture=tiny_resnet"], "text.safetensors"),
        (["--encoder={0}/begun"], "The weights of a run are in its checkpoints"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message, bad, photos, tmp_path):
    arguments = [argument.format(bad) for argument in arguments]
    width = [] if "begun" in arguments[0] or ".keras" in arguments[0] else ["--width=4"]
    common = [x for x in SMALL if x != "--width=4"] + width
    with pytest.raises((ValueError, OSError), match=f"(?s){message}") as error:
        call(*common, f"--data_dir={photos}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def bad(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(photos / "train" / "dark", folder / "unlabelled")
    shutil.copytree(photos / "train" / "dark", folder / "one" / "train" / "dark")
    shutil.copytree(photos / "val" / "dark", folder / "one" / "val" / "dark")
    shutil.copytree(photos, folder / "other")
    (folder / "other" / "val" / "new").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "other" / "val" / "new" / "a.png")
    (folder / "empty.keras").write_bytes(b"")
    (folder / "text.safetensors").write_text("no weights, but a text that is long enough")
    dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    dense.save_weights(folder / "dense.weights.h5")
    encoder = isd_tf.build_encoder("tiny_resnet", 16, 4)
    encoder.weights[0].assign(encoder.weights[0] * np.nan)
    encoder.save_weights(folder / "nan.weights.h5")
    (folder / "begun").mkdir()
    (folder / "begun" / "run.flags").write_text("--encoder=tiny_resnet\n--image_size=16\n--width=4")
    return folder


def test_another_recipe_or_other_images_are_refused(whole, noise, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    arguments = (*SMALL, f"--workdir={tmp_path / 'run'}")
    message = "begun with another recipe: --patience=3 then, --patience=2 now"
    with pytest.raises(ValueError, match=message):
        call(*arguments, f"--data_dir={noise}", "--patience=2")
    shutil.copytree(noise, tmp_path / "photos")
    shutil.move(tmp_path / "photos/train/heads/0.png", tmp_path / "photos/train/heads/00.png")
    with pytest.raises(ValueError, match="begun with other images than these 24"):
        call(*arguments, f"--data_dir={tmp_path / 'photos'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=folder"], "Finetuning needs --encoder, --workdir, as in: python"),
        (["--queue_size=8"], "finetune.py has no --queue_size. Those are run.py's"),
        (["now"], "Arguments must be flags. Received: now"),
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--patience=0"], "--patience must be at least 1"),
        (["--held_out=1"], "--held_out must be greater than 0 and smaller than 1"),
        (["--label_fraction=0"], "--label_fraction must be greater than 0"),
        (["--learning_rate=nan"], "--learning_rate must be positive and finite"),
        (["--strategy=multi_worker"], "works on one machine. Received: --strategy=multi_worker"),
        (["--workdir={0}/begun"], "must not be that of a pretraining. Received: .*begun"),
        (
            ["--encoder=resnet"],
            "workdir of a pretraining, a file, or the name.*which does not exist",
        ),
        (["--encoder={0}/one"], "must be the workdir of a pretraining.*has no run.flags"),
        (["--encoder={0}/served"], "is a SavedModel: it can be served, not trained"),
        (["--encoder={0}/one/val/dark/0.png"], "must end in one of .keras, .weights.h5"),
        (["--encoder={0}/text.safetensors"], "holds weights alone. Say of which network"),
        (["--architecture=resnet50"], "--architecture is for an --encoder of weights alone"),
        (["--encoder={0}/begun", "--width=4"], "says itself how wide it is. Leave --width out"),
        (["--encoder=resnet18"], "does not say for which images it is. Pass --image_size"),
    ],
)
def test_what_a_command_line_may_not_say(arguments, message, bad):
    (bad / "served").mkdir(exist_ok=True)
    (bad / "served" / "saved_model.pb").write_bytes(b"")
    common = ["--dataset=folder", "--encoder=tiny_resnet", "--workdir=x", "--image_size=16"]
    given = {re.match(r"--\w+", argument)[0] for argument in arguments if "--" in argument}
    if arguments in (["--dataset=folder"], ["--encoder=resnet18"]):
        common = ["--dataset=folder"] + ["--workdir=x"] * (arguments[0] != "--dataset=folder")
    common = [argument for argument in common if argument.split("=")[0] not in given]
    with pytest.raises((ValueError, OSError), match=message):
        read_flags(*common, *(argument.format(bad) for argument in arguments))


# -------------------------------------------------------------------------------------- the page


PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")


def test_the_keras_example_of_the_readme_runs_without_a_warning(
    tmp_path, monkeypatch, capsys, recwarn
):
    monkeypatch.chdir(tmp_path)
    isd_tf.build_encoder("tiny_resnet", 32, 4).save("encoder.keras")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "encoder.keras" in block)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "'accuracy'" in capsys.readouterr().out
    assert not [str(w.message) for w in recwarn if w.category is UserWarning]
    assert len(names["few"]) == 108 and names["encoder"].trainable


def test_the_flags_of_the_page_exist():
    known = {*finetune_settings.SHARED, *finetune_settings.OWN, "source", "target", "workdir"}
    assert set(re.findall(r"--(\w+)", PAGE)) <= known
