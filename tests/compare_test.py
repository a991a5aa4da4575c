"""compare.html, on workdirs that are written by hand."""

import html
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import compare  # noqa: E402

PROGRAM = pathlib.Path(compare.__file__)


def workdir_of(folder, scores, recipe=(), epochs=3, loss=1.0):
    folder.mkdir(parents=True)
    flags = ["--dataset=photo_patches", "--batch_size=64", f"--workdir={folder}", *recipe]
    (folder / "run.flags").write_text("\n".join(flags) + "\n")
    (folder / "results.json").write_text(json.dumps(scores | {"step": 9}))
    lines = [
        {"kind": "epoch", "step": i, "epoch": i, "loss": loss / i, "student_1nn": 0.1 * i}
        for i in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page_of(tmp_path, *workdirs):
    compare.write([compare.read(workdir) for workdir in workdirs], tmp_path / "compare.html")
    return (tmp_path / "compare.html").read_text()


def table(page, title):
    """The rows of a section's table, as text."""
    section = re.search(rf"<h2>{title}</h2>(.*?)</section>", page, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub("<[^>]+>", "", cell)) for cell in row] for row in cells]


def test_two_runs_differ_in_recipe_and_scores(tmp_path):
    one = workdir_of(tmp_path / "one", {"student_1nn": 0.5, "loss": 1.0}, ["--method=isd"])
    two = workdir_of(tmp_path / "<b>", {"student_1nn": 0.75}, ["--method=byol", "--nocompile"])
    page = page_of(tmp_path, one, two)
    assert table(page, "Recipes")[1:] == [["compile", "-", "false"], ["method", "isd", "byol"]]
    assert table(page, "Scores")[0] == ["score", str(one), str(two), "second less first"]
    assert table(page, "Scores")[1:] == [
        ["loss", "1", "-", "-"], ["student_1nn", "0.5", "0.75", "0.25"]
    ]  # fmt: skip
    assert f"1-NN of the students: {one}: 50.0%; {two}: 75.0%." in html.unescape(page)
    assert "<b>" not in page
    (loss,) = re.findall(r'aria-label="(Loss: [^"]*)"', page)
    assert html.unescape(loss) == f"Loss: {one} 1 to 0.3333; {two} 1 to 0.3333"


def test_groups_of_seeds_have_means_and_paired_differences(tmp_path):
    scores = {"isd": [0.50, 0.60, 0.58], "byol": [0.52, 0.63, 0.62]}
    workdirs = [
        workdir_of(tmp_path / f"{method}{seed}", {"student_1nn": score},
                   [f"--method={method}", f"--seed={seed}", f"--evaluations={method}"])
        for method, of_seeds in scores.items()
        for seed, score in enumerate(of_seeds)
    ]  # fmt: skip
    page = page_of(tmp_path, *workdirs)
    (row,) = table(page, "Groups")[1:]
    expected = [
        f"{statistic:.4g}"
        for of_seeds in scores.values()
        for statistic in (np.mean(of_seeds), np.std(of_seeds, ddof=1))
    ]
    assert row == ["student_1nn", *expected]
    (row,) = table(page, "Differences by seed")[1:]
    differences = np.subtract(scores["byol"], scores["isd"])
    error = np.std(differences, ddof=1) / np.sqrt(3)
    assert row == ["student_1nn", f"{differences.mean():.4g}", f"{error:.4g}", "3"]


def test_a_run_without_metrics_or_scores_is_said(tmp_path):
    one = workdir_of(tmp_path / "one", {})
    two = workdir_of(tmp_path / "two", {})
    (two / "metrics.jsonl").unlink()
    (two / "results.json").unlink()
    page = page_of(tmp_path, one, two)
    # Of a run that trains still, the last epoch's.
    assert f"1-NN of the students: {one} and 1 more seeds: 30.0%. Not scored: {two}." in page
    assert f"without curves: {two}" in page and "They are the same." in page
    assert "None of the runs is scored" in page_of(tmp_path, two)


def test_runs_on_other_images_or_by_other_teachers_are_no_seeds_of_one_recipe(tmp_path):
    def run_of(name, images, teacher, *recipe):
        folder = workdir_of(tmp_path / name, {"student_1nn": 0.5}, recipe)
        (folder / "dataset.json").write_text(json.dumps({"digest": images, "images": 9}))
        (folder / "teacher.json").write_text(json.dumps({"digest": teacher}))
        return folder

    alike = run_of("a", "x", "t", "--seed=0"), run_of("b", "x", "t", "--seed=1", "--nocompile")
    others = run_of("c", "y", "t", "--seed=2"), run_of("d", "x", "u", "--seed=3")
    split = run_of("e", "x", "t", "--seed=4", "--test_split=other")
    runs = [compare.read(folder) for folder in (*alike, *others, split)]
    assert len({run.group for run in runs}) == 4 and runs[0].group == runs[1].group
    page = page_of(tmp_path, alike[0], *others)
    assert ["images (digest)", "x", "y", "x"] in table(page, "Recipes")
    assert ["teacher (digest)", "t", "t", "u"] in table(page, "Recipes")
    draws = [
        run_of(f"draw{seed}", f"of {seed}", "t", "--unbalanced=1,1,8", f"--unbalanced_seed={seed}")
        for seed in (0, 1)
    ]
    assert len({compare.read(draw).group for draw in draws}) == 1


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        compare.read(tmp_path)
    broken = workdir_of(tmp_path / "broken", {})
    (broken / "results.json").write_text("{")
    with pytest.raises(ValueError, match="broken/results.json must be .* no JSON"):
        compare.read(broken)


def test_help_begins_with_an_example_and_a_call_without_runs_is_a_sentence():
    result = subprocess.run([sys.executable, PROGRAM, "--help"], capture_output=True, text=True)
    assert "python experiments/compare.py runs/quickstart" in result.stdout
    assert "--out" in result.stdout and "tensorflow" not in result.stderr
    result = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True)
    assert result.returncode == 1 and "Name the workdirs of some runs" in result.stderr
