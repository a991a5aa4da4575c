"""The evaluate stage as users run it, on a small run that is trained once."""

import errno
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import isd_tf
from isd_tf.data.batches import probe_batches
from isd_tf.data.decoding import Unreadable
from isd_tf.evaluation import features, linear, transfer
from isd_tf.report import figures
from isd_tf.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import run  # noqa: E402
import workdirs  # noqa: E402
from in_process import call  # noqa: E402
from small_runs import STEPS, full_disk, small_run  # noqa: E402

NAMES = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The workdir of a run with accuracies over its epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    call(*small_run(photos, workdir, "--stages=pretrain"))
    return workdir


@pytest.fixture
def evaluated(trained, photos, tmp_path):
    """Evaluates a copy of the trained run; returns its results."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)

    def evaluate(evaluations, *arguments):
        stages = ["--stages=evaluate", f"--evaluations={evaluations}"]
        call(*small_run(photos, workdir, *stages, *arguments))
        return results_of(workdir)

    evaluate.workdir = workdir
    return evaluate


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())


def restored(workdir):
    """The model of a small run, from its checkpoint; flags are those of the call before."""
    strategy = tf.distribute.get_strategy()
    model = run.build_model(strategy, run.build_encoder(strategy)[0], 6)
    checkpoints = Checkpoints(workdir / "checkpoints", model)
    assert checkpoints.restore_newest()
    return model


@pytest.mark.slow
def test_the_images_drawn_are_those_of_the_clusters_members(evaluated, photos, monkeypatch):
    """With one that cannot be read among them, so that rows of features and of files differ."""
    drawn = []
    monkeypatch.setattr(figures, "draw_clusters", lambda members, path: drawn.extend(members))
    for broken in (False, True):
        folder = evaluated.workdir.parent / f"photos {broken}"
        shutil.copytree(photos, folder)
        if broken:
            (folder / "train/dark/1.png").unlink()
            (folder / "train/dark/1.png").symlink_to("gone.png")
        call(*small_run(folder, evaluated.workdir), "--stages=evaluate", "--evaluations=clusters",
             "--max_unreadable=0.1")  # fmt: skip
        train, _ = isd_tf.datasets.load("folder", data_dir=str(folder))
        readable = isd_tf.evaluation_batches(train, 16, 1, Unreadable(24, 1))
        known = [images for images, _ in readable]
        assert len(known) == 24 - broken
        model = restored(evaluated.workdir)
        own = features.extract(model.student_encoder, train, 16, Unreadable(24, 1))
        found = isd_tf.evaluation.clusters.cluster(own, 2, 0)
        members = isd_tf.evaluation.clusters.draw_members(found.assignments, 10, 12, 0)
        assert [len(views) for views in drawn] == [len(rows) for rows in members]
        for views, rows in zip(drawn, members, strict=True):
            for view, row in zip(views, rows, strict=True):
                np.testing.assert_allclose(view, known[row][0], atol=1e-5)
        drawn.clear()


def search_of(workdir, name):
    return json.loads((workdir / "searches" / f"{name}.json").read_text())


def assert_documented(results):
    """Every name is one of docs/evaluation.md's, whose parts in capitals stand for others."""
    parts = {"ENCODER": "raw_pixels|untrained|initial|student|teacher", "DATASET": r"\w+"}
    parts |= {"K": "1|5|10|20|200", "TEMPERATURE": r"0\.07|0\.1"}
    parts |= {"METRIC": "top1|mean_per_class", "LABELS": r"(?:_[\d.]+pct|_\w+_\d+pct)?"}
    patterns = [re.sub("[A-Z]+", lambda m: f"(?:{parts[m[0]]})", name) for name in NAMES]
    for name in results:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_scores_and_pictures_of_a_finished_run(evaluated, photos, capsys):
    """In one call, all that needs no long training; student, teacher and untrained."""
    trained = results_of(evaluated.workdir)
    results = evaluated(
        "knn,fast_linear,weighted_knn,few_shot_knn,clusters,neighbors,curves",
        "--evaluated_encoders=student,teacher,untrained",
    )
    assert_documented(results)
    assert trained.items() <= results.items() and results["step"] == STEPS
    assert results["test_images_in_train"] == 0
    # Each encoder's own: the pictures' features give the same clusters once more.
    train, _ = isd_tf.datasets.load("folder", data_dir=str(photos))
    model = restored(evaluated.workdir)
    for encoder in ("student", "teacher"):
        own = features.extract(getattr(model, f"{encoder}_encoder"), train, 16)
        found = isd_tf.evaluation.clusters.cluster(own, 2, 0)
        assert found.scores["nmi"] == pytest.approx(results[f"{encoder}_clusters_nmi"])
    for encoder in ("student", "teacher", "untrained"):
        assert 0.4 <= results[f"{encoder}_fast_linear_top1"] <= 1
        assert 0 <= results[f"{encoder}_weighted_20nn_t0.07_top1"] <= 1
        assert 0 <= results[f"{encoder}_10shot_mean"] <= 1
        assert f"{encoder}_fast_linear_top5" not in results  # Of two classes.
        assert results[f"{encoder}_clusters"] == 2
        for score in ("purity", "nmi", "ari"):
            assert -1 <= results[f"{encoder}_clusters_{score}"] <= 1
    figures = evaluated.workdir / "figures"
    assert {path.name for path in figures.iterdir()} == {
        *(f"clusters_{encoder}.png" for encoder in ("student", "teacher", "untrained")),
        "neighbors.png",
        "student_teacher.png",
    }
    for path in figures.iterdir():
        with Image.open(path) as picture:
            assert picture.width > 200 and len(picture.convert("RGB").getcolors(2**20)) > 50
    output = capsys.readouterr().out
    for text in ("1-NN", "fast linear on 24 images", "2 clusters of 24", "purity"):
        assert text in output
    # Train and test images of three encoders, each computed once.
    assert len(list((evaluated.workdir / "features").iterdir())) == 6


def test_a_fast_linear_score_is_that_of_the_saved_student(evaluated, photos):
    results = evaluated("fast_linear", "--linear_weight_decays=0.01")
    assert results["student_fast_linear_weight_decay"] == 0.01
    # The SavedModel goes another way: decoding, views and encoder are all inside it.
    call(*small_run(photos, evaluated.workdir, "--stages=export"))
    serve = tf.saved_model.load(str(evaluated.workdir / "saved_model/1")).signatures[
        "serving_default"
    ]
    parts = []
    for split in isd_tf.datasets.load("folder", data_dir=str(photos)):
        rows = [np.asarray(Image.open(path).convert("RGB")) for path in split.paths]
        values = [serve(images=tf.constant(row[np.newaxis]))["features"][0] for row in rows]
        parts.append(features.Features(np.array(values), split.labels))
    fitted = isd_tf.evaluation.linear.fit(parts[0], [0.01 * 24])
    expected = isd_tf.evaluation.linear.top_k_accuracy(fitted, parts[1], 1)[0]
    assert results["student_fast_linear_top1"] == pytest.approx(expected)


@pytest.mark.slow
def test_linear_sees_the_references_views_of_every_epoch(evaluated, photos, monkeypatch):
    seen, trained_by, train = [], [], linear.train

    def spy(encoder, views_of_epoch, *arguments):
        seen.append([list(views_of_epoch(epoch)) for epoch in (0, 1)])
        trained_by.append(train(encoder, views_of_epoch, *arguments))
        return trained_by[-1]

    monkeypatch.setattr(linear, "train", spy)
    results = evaluated("linear", "--linear_epochs=2")
    images, test = isd_tf.datasets.load("folder", data_dir=str(photos))
    for epoch, batches in enumerate(seen[0]):
        expected = list(probe_batches(images, 16, 256, 0, epoch, Unreadable(24, 0)))
        for (views, labels), (own_views, own_labels) in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(views, own_views)
            np.testing.assert_array_equal(labels, own_labels)
    # The score is that of the trained weights, of the student, on the test images.
    (classifiers,) = trained_by
    own = features.extract(restored(evaluated.workdir).student_encoder, test, 16)
    x = (features.unit_rows(own.values) - classifiers.mean) * classifiers.inverse_deviation
    logits = x @ classifiers.weights[0] + classifiers.biases[0]
    assert results["student_linear_top1"] == np.mean(logits.argmax(axis=1) == own.labels)


@pytest.mark.slow
def test_linear_by_the_reference_and_with_few_labels(evaluated, capsys):
    results = evaluated("linear", "--linear_epochs=5")
    assert_documented(results)
    assert results["student_linear_learning_rate"] == 0.01
    assert results["student_linear_weight_decay"] == 1e-4
    assert results["student_linear_epochs"] == 5
    assert search_of(evaluated.workdir, "student_linear")["tried"] == []
    output = capsys.readouterr().out
    assert "linear: epoch 5 of 5, mean cross-entropy" in output
    assert "These were 5 steps of SGD, few for a classifier" in output

    few = evaluated(
        "linear,fast_linear", "--label_fraction=0.5", "--linear_epochs=2",
        "--linear_learning_rates=0.01,1", "--linear_weight_decays=0.001,1000",
    )  # fmt: skip
    assert_documented(few)
    assert results.items() <= few.items()  # Nothing of the whole labels' is lost.
    search = search_of(evaluated.workdir, "student_linear_50pct")
    assert search["training_images"] == 12
    assert [(t["learning_rate"], t["weight_decay"]) for t in search["tried"]] == [
        (0.01, 0.001), (0.01, 1000.0), (1.0, 0.001), (1.0, 1000.0)
    ]  # fmt: skip
    best = max(search["tried"], key=lambda t: t["held_out_top1"])
    assert search["chosen"].items() <= (best | {"epochs": 2}).items()
    assert few["student_linear_50pct_learning_rate"] == best["learning_rate"]
    assert few["student_linear_50pct_top1"] == search["scores"]["student_linear_50pct_top1"]
    search = search_of(evaluated.workdir, "student_fast_linear_50pct")
    assert [list(t) for t in search["tried"]] == [["held_out_top1", "weight_decay"]] * 2
    assert "12 images of" in capsys.readouterr().out


def test_few_labels_may_be_another_datasets(evaluated, monkeypatch):
    load = isd_tf.datasets.load

    def load_labelled(name, *arguments, **keywords):
        if name == "photos_subset/1pct":
            train, test = load("folder", data_dir=str(evaluated.photos))
            return isd_tf.subsets.take(train, np.arange(0, 24, 4), "six"), test
        return load(name, *arguments, **keywords)

    evaluated.photos = pathlib.Path(
        (evaluated.workdir / "run.flags").read_text().split("--data_dir=")[1].splitlines()[0]
    )
    monkeypatch.setattr(isd_tf.datasets, "load", load_labelled)
    results = evaluated("fast_linear", "--label_dataset=photos_subset/1pct")
    assert_documented(results)
    assert 0 <= results["student_fast_linear_photos_subset_1pct_top1"] <= 1
    with pytest.raises(
        ValueError, match="must have the classes of.*with 18 classes, not the same 2"
    ):
        evaluated("fast_linear", "--label_dataset=photo_patches")


@pytest.mark.slow
def test_a_dataset_that_fails_is_left_out_and_those_behind_it_are_not(
    evaluated, photos, tmp_path, capsys
):
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    (broken / "val/dark/0.png").write_bytes(b"broken")
    results = evaluated("transfer", f"--transfer=folder:{broken},folder:{photos}")
    assert results["student_transfer_datasets"] == results["student_transfer_left_out"] == 1
    output = capsys.readouterr().out
    assert re.search("Left out: At most 1.0%.*1 of 8.*broken/val/dark/0.png", output)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("No space left on device"), "No space left"),
        (MemoryError(), r"The memory does not suffice \(MemoryError\)"),
        (KeyError("dark"), "KeyError: 'dark'"),
    ],
)
def test_an_evaluation_that_fails_costs_neither_the_others_nor_the_export(
    error, said, evaluated, photos, capsys, monkeypatch
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(figures, "draw_clusters", fail)
    with pytest.raises(ValueError, match=f"The evaluation clusters failed: {said}"):
        call(*small_run(photos, evaluated.workdir, "--stages=evaluate,export",
                        "--evaluations=clusters,fast_linear"))  # fmt: skip
    assert "student_fast_linear_top1" in results_of(evaluated.workdir)
    assert (evaluated.workdir / "saved_model" / "1").is_dir()
    assert "Results: " in capsys.readouterr().out


def test_an_export_on_a_full_disk_is_said_and_leaves_nothing_behind(evaluated, photos, capsys):
    leftover = evaluated.workdir / "saved_model" / "unfinished-1-99999"  # Of a run that was killed.
    (leftover / "variables").mkdir(parents=True)
    with full_disk(), pytest.raises(ValueError) as error:
        call(*small_run(photos, evaluated.workdir, "--stages=evaluate,export",
                        "--evaluations=clusters"))  # fmt: skip
    text = str(error.value)
    assert (
        "The evaluation clusters failed: " in text and "The export as SavedModel failed: " in text
    )
    assert "File too large" in text and "\n" not in text
    assert not list((evaluated.workdir / "saved_model").iterdir())
    assert "Results: " in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_tensorflow_ends_costs_neither_the_others_nor_the_export(
    trained, photos, tmp_path, capsys
):
    """A query that cannot be read, a dataset that TFDS cannot open, and a log that was cut off."""
    folder, workdir = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)
    shutil.copytree(trained, workdir)
    (folder / "val/dark/0.png").write_bytes(b"broken")
    log = workdir / "metrics.jsonl"
    os.truncate(log, log.stat().st_size * 3 // 4)
    evaluations = "neighbors,transfer,curves,fast_linear"
    with pytest.raises(ValueError, match="neighbors failed: At most .*1 of 1, for example.*0.png"):
        call(*small_run(folder, workdir, "--stages=evaluate,export", "--max_unreadable=0.5",
                        f"--evaluations={evaluations}", "--query_images=0",
                        f"--transfer=cifar10:9.9.9,folder:{photos}"))  # fmt: skip
    results, output = results_of(workdir), capsys.readouterr().out
    assert "Left out: TensorFlow Datasets cannot open this dataset (AssertionError" in output
    assert results["student_transfer_datasets"] == results["student_transfer_left_out"] == 1
    assert "student_fast_linear_top1" in results and (workdir / "saved_model" / "1").is_dir()
    assert (workdir / "figures" / "student_teacher.png").exists()
    epochs, _ = workdirs.read_curves(workdir)["student"]
    assert 1 <= len(epochs) < 4 and [*epochs] == [1, 2, 3][: len(epochs)]


def test_what_was_asked_for_and_cannot_be_done_fails_beside_an_export_as_well(evaluated, photos):
    (evaluated.workdir / "metrics.jsonl").unlink()
    arguments = ["--stages=evaluate,export", "--evaluations=curves"]
    with pytest.raises(ValueError, match="curves failed: .* no accuracies over the epochs"):
        call(*small_run(photos, evaluated.workdir, *arguments))
    assert (evaluated.workdir / "saved_model" / "1").is_dir()


@pytest.mark.slow
def test_a_dataset_that_fails_for_one_encoder_has_no_score_of_another(
    evaluated, photos, tmp_path, monkeypatch
):
    other, count, evaluate = tmp_path / "other", [], transfer.evaluate
    shutil.copytree(photos, other)

    def fail_at_the_second(*arguments):
        count.append(1)
        if len(count) == 2:
            raise ValueError("The features must be finite.")
        return evaluate(*arguments)

    monkeypatch.setattr(transfer, "evaluate", fail_at_the_second)
    datasets = f"--transfer=folder:{photos},folder:{other}"
    results = evaluated("transfer", datasets, "--evaluated_encoders=student,teacher")
    for encoder in ("student", "teacher"):
        names = [n for n in results if n.startswith(f"{encoder}_transfer") and n.endswith("top1")]
        assert [results[name] for name in names] == [results[f"{encoder}_transfer_mean"]]


def test_a_full_disk_leaves_no_dataset_out(evaluated, photos, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.np, "save", full)
    with pytest.raises(ValueError, match="The evaluation transfer failed: .*No space left"):
        evaluated("transfer", f"--transfer=folder:{photos}")
    assert not any("transfer" in name for name in results_of(evaluated.workdir))


@pytest.mark.slow
def test_transfers_scores_are_those_of_the_last_list(evaluated, photos, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    evaluated("transfer", f"--transfer=folder:{photos},folder:{other}")
    results = evaluated("transfer", f"--transfer=folder:{other}")
    (score,) = (value for name, value in results.items() if "transfer_folder" in name[:-3]
                and name.endswith("top1"))  # fmt: skip
    assert results["student_transfer_mean"] == score and results["student_transfer_datasets"] == 1


@pytest.mark.slow
def test_transfer_continues_and_leaves_out_what_cannot_be_had(
    evaluated, photos, tmp_path, monkeypatch, capsys
):
    others = tmp_path / "others"
    shutil.copytree(photos, others)
    (others / "val/dark/0.png").unlink()
    tasks = f"--transfer=folder:{photos},nonesuch,folder:{others}"
    first = evaluated("transfer", tasks, "--evaluated_encoders=student,untrained")
    assert_documented(first)
    output = capsys.readouterr().out
    assert "Left out: Unknown dataset. Received: 'nonesuch'" in output
    assert "over 2 of 3 datasets, without nonesuch." in output
    (one, other) = (
        value for name, value in first.items()
        if name.startswith("student_transfer_folder") and name.endswith("top1")
    )  # fmt: skip
    assert first["student_transfer_mean"] == pytest.approx((one + other) / 2)
    assert first["student_transfer_datasets"] == 2 and first["student_transfer_left_out"] == 1
    (path, _) = sorted((evaluated.workdir / "searches").glob("student_transfer_folder*"))
    search = json.loads(path.read_text())
    assert [t["l2"] for t in search["tried"]] == list(transfer.L2_VALUES)
    assert search["chosen"]["l2"] in transfer.L2_VALUES

    # What was found is not sought again, and what was not found before is.
    fitted = []
    evaluate = transfer.evaluate
    monkeypatch.setattr(
        transfer, "evaluate", lambda *arguments: fitted.append(1) or evaluate(*arguments)
    )
    path.unlink()
    again = evaluated("transfer", tasks, "--evaluated_encoders=student,untrained")
    assert fitted == [1] and again == first
    # Other images under the same names are other images.
    Image.new("RGB", (30, 30), (90, 0, 0)).save(others / "val/light/0.png")
    evaluated("transfer", tasks)
    assert fitted == [1, 1]
    with pytest.raises(ValueError, match="None of the datasets .* nonesuch: Unknown dataset"):
        evaluated("transfer", "--transfer=nonesuch")


@pytest.mark.slow
def test_an_unbalanced_run_has_a_balanced_bank_and_rare_scores(photos, tmp_path, capsys):
    call(*small_run(photos, tmp_path, "--epochs=1", "--unbalanced=1,1,8"))
    results = results_of(tmp_path)
    assert_documented(results)
    output = capsys.readouterr().out
    assert "20 images of 2 classes" in output and "among 24:" in output
    for encoder in ("raw_pixels", "untrained", "student", "teacher"):
        for k in (1, 20):
            assert 0 <= results[f"{encoder}_{k}nn_rare"] <= 1
    with pytest.raises(ValueError, match="other images: 20 then, 21 of .*unbalanced"):
        call(*small_run(photos, tmp_path, "--epochs=1", "--unbalanced=1,1,9"))


@pytest.mark.slow
def test_rare_classes_without_test_images_are_said(photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    run = small_run(folder, tmp_path / "run", "--epochs=1", "--unbalanced=1,1,8")
    train, test = isd_tf.datasets.load("folder", data_dir=str(folder))
    rare = isd_tf.subsets.unbalance(train, test, 1, 1, 8, 0).pretraining.class_names[1]
    shutil.rmtree(folder / "val" / rare)
    call(*run)
    assert "has no images of the rare classes" in capsys.readouterr().out
    assert not any(name.endswith("rare") for name in results_of(tmp_path / "run"))


def test_a_training_by_a_data_service_has_no_neighbors(evaluated, photos):
    flags = evaluated.workdir / "run.flags"
    flags.write_text(flags.read_text() + "--data_service=localhost:5050\n")
    with pytest.raises(ValueError, match="--data_service gave the images an order"):
        evaluated("neighbors")


def test_curves_are_those_of_all_runs_and_end_with_the_results(trained, evaluated):
    curves = workdirs.read_curves(trained)
    results = evaluated("knn,curves", f"--compare_with={trained},{trained}")
    for encoder in ("student", "teacher"):
        epochs, accuracies = curves[encoder]
        assert [*epochs] == [1, 2, 3, 4]
        assert accuracies[-1] == pytest.approx(results[f"{encoder}_1nn"], abs=1e-6)


@pytest.mark.slow
def test_classes_of_any_name_are_scored_drawn_and_exported(photos, tmp_path, capsys, caplog):
    folder = tmp_path / "caf\udce9 \u202e$x$"
    shutil.copytree(photos, folder)
    for split in ("train", "val"):
        (folder / split / "dark").rename(folder / split / "new\nline\x1b[31m")
        (folder / split / "light").rename(folder / split / "$\\frac{1}$ 猫 caf\udce9")
    (folder / "train" / "new\nline\x1b[31m" / "3.png").write_bytes(b"broken")
    shutil.copy(
        next((folder / "val").rglob("1.png")), folder / "train" / "$\\frac{1}$ 猫 caf\udce9"
    )
    names = "--evaluations=knn,clusters,neighbors"
    call(*small_run(folder, tmp_path / "run", "--epochs=3", names, "--max_unreadable=0.1",
                    "--knn_every_epochs=0"))  # fmt: skip
    said = capsys.readouterr().out.splitlines() + [r.getMessage() for r in caplog.records]
    assert all(line.isprintable() for line in said), said
    assert sum("new\\nline\\x1b[31m" in line for line in said) >= 2
    assert (tmp_path / "run" / "figures" / "neighbors.png").exists()


def test_results_are_about_one_step(tmp_path):
    workdirs.record(tmp_path, {"loss": 1.0}, 10)
    workdirs.record(tmp_path, {"student_1nn": 0.5}, 10)
    assert results_of(tmp_path) == {"loss": 1.0, "student_1nn": 0.5, "step": 10}
    workdirs.record(tmp_path, {"loss": 0.9}, 20)
    assert results_of(tmp_path) == {"loss": 0.9, "step": 20}


@pytest.mark.slow
def test_a_method_without_a_queue_has_no_neighbors_and_the_run_goes_on(photos, tmp_path, capsys):
    run = small_run(photos, tmp_path, "--epochs=1", "--method=byol")
    call(*run, "--evaluations=neighbors,curves,fast_linear", "--stages=pretrain,evaluate")
    output = capsys.readouterr().out
    # Typed; --teacher_temperature is imagenet.flags'.
    assert "Of no effect with --method=byol: --queue_size.\n" in output
    assert "Not evaluated: neighbors. --method=byol has no queue." in output
    assert "student_fast_linear_top1" in results_of(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluations=knn,probe"], "some of knn, linear.*Received: --evaluations=knn,probe"),
        (["--evaluations="], "--evaluations must be some of"),
        (["--evaluated_encoders=key"], "some of student, teacher, untrained, initial.*key"),
        (["--label_fraction=0"], "greater than 0 and at most 1. Received: 0"),
        (["--label_fraction=1.5"], "greater than 0 and at most 1. Received: 1.5"),
        (
            ["--evaluations=linear", "--label_fraction=0.01"],
            "Every class needs a labelled image.*dark.*at least 0.13",
        ),
        (
            ["--evaluations=fast_linear", "--label_fraction=0.05"],
            "Choosing hyper-parameters needs a class with two labelled examples",
        ),
        (["--label_fraction=0.1", "--label_dataset=x"], "either a share or a dataset"),
        (["--linear_learning_rates=0.1,fast"], "must be positive numbers. Received: .*0.1,fast"),
        (["--linear_weight_decays=0"], "must be positive numbers"),
        (["--linear_epochs=0"], "--linear_epochs must be at least 1 .*Received: 0"),
        (["--clusters=0"], "--clusters must be at least 1 .*Received: 0"),
        (["--clusters=25"], "at most the 24 images"),
        (["--query_images=8"], "rows of the 8 images of .*val. Received: 8"),
        (["--query_images=-1"], "counted from 0"),
        (["--query_images=a"], "whole numbers. Received: --query_images=a"),
        (["--evaluations=transfer", "--transfer="], "needs datasets"),
        (["--unbalanced=1,2"], "LARGE,RARE,IMAGES.*Received: 1,2"),
        (["--unbalanced=2,1,1"], "no more classes than there are.*2 classes of"),
        (["--unbalanced=nowhere.txt"], "does not exist.*nowhere.txt"),
        (
            ["--evaluations=curves", "--compare_with=nowhere"],
            "Received: nowhere, without run.flags",
        ),
        (["--transfer=a-b,c,a_b"], "must name datasets apart. Received: a-b, a_b"),
        (["--transfer=pets,oxford_iiit_pet"], "Received: pets, oxford_iiit_pet"),
        (["--transfer=folder:a,folder:a/"], "must name datasets apart. Received: folder:a, "),
        (["--evaluations=transfer", "--transfer=folder:gone"], "No such folder.*folder:gone"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, message, evaluated, photos):
    stages = ["--stages=evaluate"] * (not arguments[0].startswith("--unb"))
    workdir = evaluated.workdir if stages else evaluated.workdir / "new"
    with pytest.raises((ValueError, OSError), match=message):
        call(*small_run(photos, workdir, *stages, *arguments))
