"""--method=compress as users run it: any teacher, the same one to the end, and bad input."""

import json
import os
import pathlib
import re
import shutil
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import isd_tf
from isd_tf.serving.saved_encoder import load_encoder

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import teachers  # noqa: E402
from in_process import call, set_flags  # noqa: E402
from small_runs import assert_same_end, newest_weights, small_run  # noqa: E402

COMPRESS = ["--method=compress", "--views=crop", "--temperature=0.04"]
VIEWS = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


def compress_run(photos, workdir, teacher, *arguments):
    return [*small_run(photos, workdir), *COMPRESS, f"--teacher={teacher}", *arguments]


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The workdir of a run whose student, or teacher, is to teach; wider than its pupils."""
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    call(*small_run(photos, workdir, "--width=8", "--epochs=1", "--knn_every_epochs=0",
                    "--stages=pretrain,evaluate"))  # fmt: skip
    return workdir


@pytest.fixture(scope="module")
def finished(photos, trained, tmp_path_factory):
    """A whole run by that teacher, all of whose checkpoints are kept."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    call(*compress_run(photos, workdir, trained, "--keep_checkpoints=99", "--epochs=3",
                       "--evaluations=knn,clusters,neighbors,curves"))  # fmt: skip
    return workdir


def encoder_of(workdir, which, width):
    encoder = isd_tf.build_encoder("tiny_resnet", 16, width)
    path = max((workdir / "checkpoints").glob("step-*")) / "state"
    holder = tf.train.Checkpoint(model=tf.train.Checkpoint(**{f"{which}_encoder": encoder}))
    holder.read(str(path)).assert_existing_objects_matched().expect_partial()
    return encoder


def loaded_teacher(*arguments):
    """What the flags load, with the features that it makes of VIEWS."""
    set_flags(*compress_run("unused", "unused", *arguments))
    return teachers.load()(VIEWS, training=False)


def test_a_run_shows_how_much_of_the_teachers_sight_has_arrived(finished, trained):
    results = json.loads((finished / "results.json").read_text())
    for name in ("raw_pixels", "untrained", "student", "teacher"):
        assert 0 <= results[f"{name}_1nn"] <= 1
    before = json.loads((trained / "results.json").read_text())
    for k in (1, 20):  # The frozen teacher is the other run's student, scored as it was there.
        assert results[f"teacher_{k}nn"] == before[f"student_{k}nn"]
    assert np.isfinite(results["loss"]) and "purity" in results
    figures = {path.name for path in finished.glob("figures/*")}
    assert figures == {"clusters_student.png", "neighbors.png", "student_teacher.png"}


def test_the_export_is_the_students_encoder_without_the_head(finished):
    exported = load_encoder(finished / "saved_model")
    student = encoder_of(finished, "student", 4)
    np.testing.assert_allclose(exported(VIEWS), student(VIEWS, training=False), atol=1e-5)
    assert exported.output_shape == (None, 16) and exported.count_params() == student.count_params()


def test_checkpoints_hold_the_digest_of_the_teacher_and_not_the_teacher(finished, trained):
    record = json.loads((finished / "teacher.json").read_text())
    assert record["image_size"] == 16 and record["features"] == 32 and len(record["digest"]) > 9
    teacher = {weight.numpy().tobytes() for weight in encoder_of(trained, "student", 8).weights}
    _, weights = newest_weights(finished)
    stored = {value.tobytes() for key, value in weights.items() if np.size(value) > 16}
    assert stored and not stored & teacher


def test_a_continued_run_ends_in_the_bits_of_an_unbroken_one(finished, photos, trained, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 8:
            shutil.rmtree(path)
    # From another place, which is the same teacher all the same.
    shutil.copytree(trained, tmp_path / "moved")
    arguments = compress_run(photos, tmp_path / "run", tmp_path / "moved", "--epochs=3")
    call(
        *arguments,
        "--keep_checkpoints=99",
        "--stages=pretrain",
        "--knn_every_epochs=0",
        "--steps_per_execution=2",
    )
    assert_same_end(tmp_path / "run", finished)


def test_another_teacher_is_refused_and_changes_nothing(finished, photos, trained, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    message = "begun with another teacher: digest .* then, .* now.*another --workdir"
    arguments = compress_run(photos, finished, trained, "--epochs=3")
    # Of other features the checkpoint does not fit either, and is not asked.
    random = ["--teacher=tiny_resnet", "--teacher_weights=random"]
    for other in (["--teacher_encoder=teacher"], random):
        with pytest.raises(ValueError, match=message):
            call(*arguments, *other)
    for path, content in before.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_runs_encoder_teaches(which, trained):
    features = loaded_teacher(trained, f"--teacher_encoder={which}")
    expected = encoder_of(trained, which, 8)(VIEWS, training=False)
    np.testing.assert_array_equal(features, expected)


def test_a_named_encoder_teaches_by_the_weights_of_a_file_or_a_run(trained, tmp_path):
    encoder = isd_tf.build_encoder("tiny_resnet", 16)
    encoder.save_weights(tmp_path / "a.weights.h5")
    features = loaded_teacher("tiny_resnet", f"--teacher_weights={tmp_path / 'a.weights.h5'}")
    np.testing.assert_array_equal(features, encoder(VIEWS, training=False))
    with pytest.raises(ValueError, match="another network's.*mis-shaped"):  # Narrower.
        loaded_teacher("tiny_resnet", f"--teacher_weights={trained}")


def test_files_teach_what_their_encoder_sees(trained, tmp_path):
    encoder = encoder_of(trained, "student", 8)
    expected = encoder(VIEWS, training=False)
    encoder.save(tmp_path / "encoder.keras")
    isd_tf.export_encoder(encoder, 16, tmp_path / "served")
    for source in ("encoder.keras", "served", "served/1"):
        features = loaded_teacher(tmp_path / source)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5, err_msg=source)
    whole = isd_tf.ISD(encoder, None, None, 8)
    whole.teacher_encoder.set_weights([w + 1 for w in whole.teacher_encoder.get_weights()])
    whole.save(tmp_path / "isd.keras")
    np.testing.assert_array_equal(loaded_teacher(tmp_path / "isd.keras"), expected)
    theirs = loaded_teacher(tmp_path / "isd.keras", "--teacher_encoder=teacher")
    np.testing.assert_array_equal(theirs, whole.teacher_encoder(VIEWS, training=False))


def test_a_teacher_for_any_size_is_shown_the_size_that_was_asked_for(tmp_path):
    images = keras.Input((None, None, 3))
    pooled = keras.layers.GlobalMaxPooling2D()(keras.layers.AveragePooling2D(4)(images))
    keras.Model(images, pooled).save(tmp_path / "any.keras")
    set_flags(*compress_run("unused", "unused", tmp_path / "any.keras"), "--teacher_image_size=24")
    assert teachers.load().input_shape == (None, 24, 24, 3)


@pytest.fixture(scope="module")
def others(trained, tmp_path_factory):
    """What cannot teach."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "begun").mkdir()
    shutil.copy(trained / "run.flags", folder / "begun")
    (folder / "empty").mkdir()
    (folder / "broken.keras").write_bytes(b"PK")
    grey = keras.Input((16, 16, 1))
    keras.Model(grey, keras.layers.GlobalMaxPooling2D()(grey)).save(folder / "grey.keras")
    images = keras.Input((16, 16, 3))
    keras.Model(images, keras.layers.ReLU()(images)).save(folder / "map.keras")
    archive = keras.export.ExportArchive()
    spec = tf.TensorSpec([None, 16, 16, 3], tf.float32, name="images")
    archive.add_endpoint("serve", lambda images: {"features": images[:, 0, 0]}, [spec])
    archive.write_out(str(folder / "served" / "1"), verbose=False)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher="], "must set --teacher"),
        (["--teacher=resnet18"], "random weights teaches nothing.*--teacher=resnet18 without"),
        (["--teacher=resnet18", "--teacher_weights=gone.pth"], "No such file.*gone.pth"),
        (["--teacher=gone.keras"], "--teacher must be the workdir of a run, .*gone.keras"),
        (["--teacher=vit"], "the name of an encoder: resnet18, .*Received: vit"),
        (["--teacher={others}/empty"], "--teacher must be the workdir of a run, .*empty"),
        (["--teacher={others}/begun"], "must have a checkpoint to be a teacher.*begun"),
        (["--teacher={others}/broken.keras"], "broken.keras cannot be loaded as a Keras model"),
        (["--teacher={others}/grey.keras"], r"see the same images.*\(16, 16, 1\).*\(16, 16, 3\)"),
        (["--teacher={others}/map.keras"], "one vector of features"),
        (["--teacher={others}/served"], "signature `encode`.*served/1 with serve, serving_default"),
        (["--teacher={trained}", "--workdir={trained}"], "cannot be its own teacher"),
        (["--teacher={trained}", "--teacher_weights=x"], "has weights of its own.*=x. Leave it"),
        (["--teacher={trained}", "--queue_size=3"], r"at least the global batch size \(4\)"),
        (["--teacher={trained}", "--temperature=0"], "temperature must be greater than 0"),
        (["--teacher={trained}", "--views=crop/crop/crop"], "Unknown views.*one that both see"),
        (["--teacher={finished}", "--teacher_encoder=teacher"], "keeps its student only.*finished"),
        (["--teacher={others}/map.keras", "--teacher_image_size=20"], r"\(16, 16, 3\).*size=20"),
        (["--method=isd", "--views=weak/weak", "--teacher={trained}"],
         "Only --method=compress takes a given teacher.*--teacher with --method=isd"),
        (["--method=isd", "--views=weak/weak", "--teacher_encoder=teacher"],
         "Only --method=compress takes .*--teacher_encoder with --method=isd"),
        (["--method=isd"], "Unknown views.*--views=crop"),
        (["--method=msf", "--neighbors=17", "--views=weak/weak"], "at most --queue_size=16.*17"),
        (["--method=msf", "--views=weak/weak"], "must set --neighbors"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(
    arguments, message, photos, others, trained, finished, tmp_path
):
    places = dict(others=others, trained=trained, finished=finished)
    arguments = [argument.format(**places) for argument in arguments]
    with pytest.raises((ValueError, OSError), match=message):
        call(*small_run(photos, tmp_path / "run"), *COMPRESS, *arguments)
    assert not os.path.exists(tmp_path / "run")


def test_the_temperature_must_be_chosen_as_the_flags_default_is_mocos(photos, tmp_path, trained):
    arguments = [*small_run(photos, tmp_path), "--method=compress", "--views=crop"]
    with pytest.raises(ValueError, match="must set --temperature"):
        set_flags(*arguments, f"--teacher={trained}")


def test_the_example_of_the_page_on_distillation_runs(tmp_path, monkeypatch):
    page = pathlib.Path(__file__).parent.parent / "docs" / "distillation.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, page.name, "exec"), {})
    assert load_encoder("runs/distilled").output_shape == (None, 64)
