"""The launcher and the Slurm file, with scripts of a few lines in place of run.py."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
# What a worker knows, and a first attempt that leaves a marker behind.
PREAMBLE = """
import json, os, pathlib, signal, sys, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]

def first_time():
    marker = pathlib.Path(f"marker{index}")
    known = marker.exists()
    marker.touch()
    return not known

def wait_for(name):
    end = time.monotonic() + 20  # A failed test leaves nobody behind.
    while not pathlib.Path(name).exists() and time.monotonic() < end:
        time.sleep(0.02)
"""


def start(folder, script, workers=2, restarts=0, grace=30):
    (folder / "worker.py").write_text(PREAMBLE + script)
    driver = (
        f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import launch\n"
        f"launch.GRACE_SECONDS = {grace}\n"
        f"sys.exit(launch.launch([sys.executable, 'worker.py'], {workers}, {restarts}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", driver],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launched(*arguments, **settings):
    """Exit code and output of a launcher that ends by itself."""
    process = start(*arguments, **settings)
    output = process.communicate(timeout=20)[0]
    return process.returncode, output


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "Waited 10 s in vain."
        time.sleep(0.02)


def exist(folder, *names):
    return lambda: all((folder / name).exists() for name in names)


def test_each_worker_is_told_the_same_cluster_and_its_own_index(tmp_path):
    code, output = launched(tmp_path, "print(os.environ['TF_CONFIG'])", workers=3)
    assert code == 0
    configs = {
        int(index): json.loads(config)
        for index, config in re.findall(r"^\[worker (\d)\] (\{.*)$", output, re.MULTILINE)
    }
    assert sorted(configs) == [0, 1, 2]
    for index, config in configs.items():
        assert config["task"] == {"type": "worker", "index": index}
        assert config["cluster"] == configs[0]["cluster"]
    addresses = configs[0]["cluster"]["worker"]
    assert len(set(addresses)) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)


def test_every_line_of_both_streams_names_its_worker_as_soon_as_it_is_printed(tmp_path):
    script = "print('out', index); print('err', index, file=sys.stderr); wait_for('go')"
    process = start(tmp_path, script)
    lines = [process.stdout.readline().rstrip() for _ in range(4)]  # The workers still run.
    (tmp_path / "go").touch()
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 0
    assert sorted(lines) == [f"[worker {i}] {name} {i}" for i in (0, 1) for name in ("err", "out")]


def test_all_are_restarted_when_one_is_killed(tmp_path):
    script = """
print("first" if first_time() else "second", config["cluster"]["worker"])
if not pathlib.Path("killed").exists():
    if index == 1:
        wait_for("marker0")
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for("killed")
    time.sleep(0.5)
    sys.exit(75)
"""
    code, output = launched(tmp_path, script, restarts=3)
    assert code == 0
    assert (
        "Worker 1 ended by SIGKILL, as where the machine's memory ran out.\n"
        "None can go on without it: worker 0 will notice and end; in 30 s the launcher ends who "
        "has not.\n"
    ) in output
    assert "Worker 0 ended with exit code 75 (it has lost another worker).\n" in output
    before, after = output.split(
        "Restarting all workers from the last checkpoint (restart 1 of 3).\n"
    )
    for index in (0, 1):
        assert f"[worker {index}] first" in before
        assert f"[worker {index}] second" in after


@pytest.mark.parametrize(
    "script, expected, said",
    [
        (
            "if index == 1: os.kill(os.getpid(), signal.SIGKILL)\nwait_for('never')",
            137,
            "Worker 1 was the first to end, by SIGKILL, as",
        ),
        ("os.abort()", 134, "was the first to end, by SIGABRT. The same command continues"),
        ("sys.exit(75)", 75, "was the first to end, with exit code 75 (it has lost another"),
    ],
)
def test_without_a_restart_left_the_first_dead_workers_code_is_the_launchers(
    script, expected, said, tmp_path
):
    code, output = launched(tmp_path, script, restarts=1, grace=0.1)
    assert code == expected
    assert output.count("Restarting all workers") == 1
    assert "No restart is left of 1. Worker " in output and said in output


@pytest.mark.parametrize("first", [0, 1])
def test_a_workers_own_error_is_not_retried_whichever_end_is_seen_first(first, tmp_path):
    script = f"""
if index == {first}:
    pathlib.Path("ends").touch()
else:
    wait_for("ends")
    time.sleep(0.5)
sys.exit([75, 2][index])
"""
    code, output = launched(tmp_path, script, restarts=3)
    assert code == 2
    assert "Restarting" not in output
    assert "No restart cures an error of its own: worker 1 has said it above." in output
    ends = [f"Worker {index} ended with exit code {[75, 2][index]} (" for index in (0, 1)]
    assert output.index(ends[first]) < output.index(ends[1 - first])


@pytest.mark.parametrize("stopped", [143, 130])
def test_workers_that_were_told_to_stop_are_not_restarted(stopped, tmp_path):
    script = f"sys.exit({stopped} if index == 0 else 75)"
    code, output = launched(tmp_path, script, restarts=3)
    assert code == stopped
    assert "Restarting" not in output


def test_a_worker_that_hangs_after_another_died_is_killed_after_the_grace(tmp_path):
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(f"ready{index}").touch()
if index == 1:
    wait_for("ready0")
    sys.exit(75)
time.sleep(0.2)
print("still here")
wait_for("never")
"""
    start = time.monotonic()
    code, output = launched(tmp_path, script, grace=0.5)
    assert code == 75
    assert "[worker 0] still here" in output
    order = [
        *("Worker 1 ended", "None can go on without it: worker 0 will notice and end; in 0.5 s"),
        "Worker 0 has not ended by itself: the launcher ends it. (Who scores",
        "Worker 0 ended by SIGKILL of the launcher.",
    ]
    assert [output.count(text) for text in order] == [1, 1, 1, 1]
    assert sorted(order, key=output.index) == order
    assert time.monotonic() - start < 5


SAVE_WHEN_TOLD = """
def save(number, frame):
    pathlib.Path(f"told{index}").touch()
    time.sleep(0.3 * index)  # Longer than the grace.
    print("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
pathlib.Path(f"ready{index}").touch()
wait_for("never")
"""


@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_launcher_told_to_stop_lets_all_workers_save(number, expected, tmp_path):
    process = start(tmp_path, SAVE_WHEN_TOLD, restarts=3, grace=0.01)
    wait_until(exist(tmp_path, "ready0", "ready1"))
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == expected
    for index in (0, 1):
        assert f"[worker {index}] saved" in output
        assert f"Worker {index} ended with exit code 143 (it was told to stop" in output
    assert "Restarting" not in output


def test_a_second_interrupt_kills_the_workers(tmp_path):
    script = SAVE_WHEN_TOLD.replace("time.sleep(0.3 * index)", "wait_for('never')")
    process = start(tmp_path, script, restarts=3)
    wait_until(exist(tmp_path, "ready0", "ready1"))
    process.send_signal(signal.SIGINT)
    wait_until(exist(tmp_path, "told0", "told1"))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130
    assert output.count("ended by SIGKILL") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux tells a child of its parent's end.")
def test_the_workers_of_a_killed_launcher_save_and_end(tmp_path):
    script = SAVE_WHEN_TOLD.replace('print("saved")', 'pathlib.Path(f"saved{index}").touch()')
    process = start(tmp_path, script)
    wait_until(exist(tmp_path, "ready0", "ready1"))
    process.kill()
    process.communicate(timeout=20)  # The pipe stays open as long as anyone lives.
    wait_until(exist(tmp_path, "saved0", "saved1"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers=0", "--", "--x=1"], "--workers must be at least 1. Received: 0."),
        (["--restarts=-1", "--", "--x=1"], "--restarts must be at least 0. Received: -1."),
        (["--workers=two", "--", "--x=1"], "invalid int value: 'two'"),
        (["--workers=2"], "Expected run.py's flags behind --. Received: nothing."),
        (["--workers=2", "--"], "Expected run.py's flags behind --. Received: nothing."),
        (["--flagfile=quickstart.flags"], "unrecognized arguments: --flagfile=quickstart.flags"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message):
    result = subprocess.run(
        [sys.executable, EXPERIMENTS / "launch.py", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "-- FLAGS OF run.py" in result.stderr


def test_all_behind_the_two_dashes_reaches_run_py_untouched(tmp_path):
    (tmp_path / "run.py").write_text("import sys; print(sys.argv[1:])")
    driver = (
        f"import sys, pathlib; sys.path.insert(0, {str(EXPERIMENTS)!r}); import launch\n"
        "launch.RUN = pathlib.Path('run.py'); sys.exit(launch.main())"
    )
    given = ["--flagfile=x", "--workers=9", "a b", "--", "-h"]
    result = subprocess.run(
        [sys.executable, "-c", driver, "--workers=1", "--", *given],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stdout == f"[worker 0] {given}\n"


def test_the_launcher_does_not_import_tensorflow():
    code = "import sys, launch; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS, check=True)


# ------------------------------------------------------------------------------------- Slurm

# Runs its command once a node, one after another, and returns the highest exit code.
FAKE_SRUN = """#!/bin/bash
echo "srun options: ${*:1:3}"
shift 3
highest=0
for SLURM_PROCID in 0 1; do
    export SLURM_PROCID
    "$@" || { code=$?; ((code > highest)) && highest=$code; }
done
exit $highest
"""
FAKE_SCONTROL = """#!/bin/bash
case "$1 $2 $3" in
    "show hostnames gpu[07-08]") printf "gpu07\\ngpu08\\n" ;;
    "requeue 41234 ") echo "requeued" ;;
    *) echo "not a scontrol command that is known here: $*" >&2; exit 1 ;;
esac
"""
FAKE_PYTHON = """#!/bin/bash
echo "TF_CONFIG=$TF_CONFIG"
echo "arguments: $*"
[ "$SLURM_PROCID" = 1 ] || exit "$CODE_OF_WORKER_0"
exit "$CODE_OF_WORKER_1"
"""


@pytest.fixture
def sbatch(tmp_path):
    """Runs slurm.sbatch on a made-up cluster of two nodes."""

    def add(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    add("bin/srun", FAKE_SRUN)
    add("bin/scontrol", FAKE_SCONTROL)
    add(".venv/bin/python", FAKE_PYTHON)

    def run(*arguments, code=0, **more):
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "gpu[07-08]",
            "SLURM_CPUS_PER_TASK": "32",
            "CODE_OF_WORKER_0": "0",
            "CODE_OF_WORKER_1": str(code),
        }
        return subprocess.run(
            ["bash", EXPERIMENTS / "slurm.sbatch", *arguments],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
        )

    return run


def test_slurm_tells_each_node_the_same_cluster_and_its_own_index(sbatch):
    result = sbatch("--data_dir=/a b")
    assert (result.returncode, result.stderr) == (0, "")
    configs = [json.loads(text) for text in re.findall(r"TF_CONFIG=(.*)", result.stdout)]
    assert [config["task"] for config in configs] == [
        {"type": "worker", "index": 0},
        {"type": "worker", "index": 1},
    ]
    for config in configs:  # 12000 + 41234 % 20000
        assert config["cluster"] == {"worker": ["gpu07:13234", "gpu08:13234"]}
    assert (
        "arguments: experiments/run.py --flagfile=imagenet.flags --strategy=multi_worker "
        "--workdir=runs/imagenet --data_dir=/a b\n"
    ) in result.stdout
    assert "srun options: --label --kill-on-bad-exit=0 --wait=0\n" in result.stdout
    assert "requeue" not in result.stdout


@pytest.mark.parametrize("code, requeued", [(75, 1), (143, 1), (137, 1), (1, 0), (2, 0), (130, 0)])
def test_slurm_requeues_what_a_restart_can_cure(code, requeued, sbatch):
    result = sbatch(code=code)
    assert (result.returncode, result.stderr) == (code, "")
    assert result.stdout.count("requeued") == requeued


def test_slurm_does_not_requeue_an_error_of_one_worker_that_the_other_lost(sbatch, tmp_path):
    result = sbatch(code=75, CODE_OF_WORKER_0="1")
    assert result.returncode == 75 and "requeue" not in result.stdout
    assert not list(tmp_path.glob(".slurm-*"))


def test_slurm_requeues_not_forever(sbatch):
    assert "restart 20 of 20" in sbatch(code=75, SLURM_RESTART_COUNT="19").stdout
    result = sbatch(code=75, SLURM_RESTART_COUNT="20")
    assert result.returncode == 75
    assert "no restart is left of 20" in result.stdout
    assert "requeued" not in result.stdout


def test_slurm_stops_when_the_nodes_are_unknown(sbatch):
    result = sbatch(SLURM_JOB_NODELIST="elsewhere")
    assert result.returncode == 1
    assert "srun" not in result.stdout
