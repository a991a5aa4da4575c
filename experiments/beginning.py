"""The beginning of a run in its workdir, or the proof that it goes on as it was begun."""

import json
import pathlib

import flagfiles
import run_data
import settings
import teachers
import workdirs
from settings import FLAGS

from isd_tf.data.datasets import Dataset
from isd_tf.training import cluster, initial_weights
from isd_tf.training.checkpoints import Checkpoints

DATASET = "dataset.json"  # Of a workdir: which images it was begun with.


def begin_or_continue(
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    data: run_data.Data | None,
    initial: initial_weights.InitialWeights | None,
) -> None:
    """Leaves the recipe in a new workdir; in one with checkpoints, compares it.

    Raises:
        ValueError: where it was begun with another recipe, weights, teacher or images.
    """
    teacher = None
    if FLAGS.method == "compress":  # Its teacher is in no checkpoint.
        teacher = teachers.record(checkpoints.model.encoders()["teacher"])
        cluster.require_same(checkpoints.strategy, {"teacher": json.dumps(teacher)})
    with cluster.failing_together(checkpoints.strategy):
        if not cluster.is_chief(checkpoints.strategy):
            return
        train = data.train if data else None
        if data:
            workdirs.name_left_out(workdir, data.bank, data.test)
        if not checkpoints.exist:
            (workdir / workdirs.METRICS).unlink(missing_ok=True)  # Of a run that saved nothing.
            flagfiles.write(workdir / "run.flags", settings.own_flags())
            (workdir / DATASET).write_text(json.dumps(run_data.fingerprint(train)) + "\n")
            if train:
                workdirs.keep_images(workdir, train)
            if initial:
                workdirs.keep_initial_weights(workdir, initial, checkpoints.model.student_encoder)
            if teacher:
                workdirs.write_json(workdir / workdirs.TEACHER, teacher)
        else:
            require_same_run(workdir, train)
            if teacher:
                workdirs.require_same_teacher(workdir, teacher, FLAGS.teacher)
        stages = ",".join(FLAGS.stages)
        trained_on = train if "pretrain" in FLAGS.stages else None
        workdirs.note_versions(workdir, checkpoints, stages, trained_on)


def require_same_run(workdir: pathlib.Path, train: Dataset | None) -> None:
    """Raises ValueError where a workdir was begun with another recipe, weights or images."""
    flagfiles.require_same(workdir / "run.flags", settings.recipe())
    workdirs.require_same_initial_weights(workdir)
    record, now = workdir / DATASET, run_data.fingerprint(train)
    before = workdirs.read_json(record) if record.exists() else now
    if train and before != now:
        same_number = before["images"] == len(train)
        raise ValueError(
            f"The workdir {workdir} was begun with other images: {before['images']} then, "
            f"{len(train)} of {train.name} now"
            + (workdirs.say_other_image(workdir, train) if same_number else "")
            + ". Restore them to continue it, or use another --workdir."
        )
