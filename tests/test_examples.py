"""Every file under examples/ is run or parsed: scripts with fakes of srun, gcloud and so on, their command lines by the
programs' own flags. Of a status, EXIT_STOPPED is the one that says: saved, to be continued."""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import plot_metrics
import train_flow
from tests import test_readme
from tests.conftest import ROOT, run_program
from utils.base.processes import END_SIGNALS, EXIT_STOPPED, check_numbers

EXAMPLES = ROOT / "examples"
FILES = sorted(path for path in EXAMPLES.iterdir() if path.is_file() and not path.name.startswith("."))
PAGE = (ROOT / "docs" / "clusters.md").read_text()
SCRIPTS = [path for path in FILES if path.read_bytes().startswith(b"#!/bin/bash\n")]
# Everything that a script finds on its PATH beside its fakes: a fake that is missing fails, and reaches no process.
TOOLS = ("bash", "cat", "dirname", "mkdir", "mv", "rm", "sed", "sleep", "test", "touch")


@pytest.fixture
def run_script(tmp_path):
    """run_script(path, words, fakes, variables) -> (done, calls): the script with nothing on its PATH but TOOLS and the
    fakes, {name: what they do in bash}, and what was called, in order, as lists of words."""
    folder, log = tmp_path / "bin", tmp_path / "calls"

    def run(script, words=(), fakes=None, variables=None):
        folder.mkdir(exist_ok=True)
        for name, body in (fakes or {}).items():
            note = f"printf '%s\\0' {name} \"$@\" >> {log}; printf '\\n\\0' >> {log}"
            (folder / name).write_text(f"#!/bin/bash\n{note}\n{body}\n")
            (folder / name).chmod(0o755)
        for tool in TOOLS:  # last: a fake would be written through the link
            if not (folder / tool).exists():
                (folder / tool).symlink_to(shutil.which(tool))
        environment = {"PATH": str(folder), "HOME": str(tmp_path), **(variables or {})}
        command = ["/bin/bash", *([str(script)] if isinstance(script, Path) else ["-c", script]), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        calls = log.read_text().split("\n\0")[:-1] if log.exists() else []
        return done, [call.split("\0")[:-1] for call in calls]

    return run


@pytest.fixture
def read_training(read_flags):
    """read_training(words) -> the flags of `PYTHON train_flow.py --name value ...`."""

    def read(words):
        assert re.fullmatch(r"(.*/)?python", words[0]), words
        assert words[1] == "train_flow.py"
        return read_flags(train_flow, words[2:])

    return read


def test_every_file_has_a_test_and_a_page():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    pages = "".join(test_readme.PAGES.values())
    for path in FILES:
        assert path in test_readme.PAGES or f'"{path.name}"' in tests, f"no test knows {path.name}"
        assert f"examples/{path.name}" in pages, f"no page names {path.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_that_starts_as_it_says(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")  # sbatch reads the other
    usage = re.search(rf"^# +(?:\w+=\S+ )*(?:sbatch )?(examples/{re.escape(script.name)})", script.read_text(), re.M)
    assert usage, "its head has no command to type"


# --- SLURM ---


@pytest.mark.parametrize("status", [0, 1, EXIT_STOPPED, 137])
def test_slurm_puts_a_run_that_was_stopped_back_into_the_queue(run_script, read_training, status, tmp_path):
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "64"}
    fakes = {"srun": f"exit {status}", "scontrol": ""}
    done, calls = run_script(EXAMPLES / "slurm.sbatch", (), fakes, variables)
    assert (done.returncode, done.stderr) == (status, "")
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if status == EXIT_STOPPED else [])
    srun, *words = calls[0]
    assert (srun, words[:2]) == ("srun", ["--cpus-per-task=64", "--kill-on-bad-exit=0"])
    assert read_training(words[2:]).coordinator_address == "auto"


def test_slurm_gives_the_run_time_to_save():
    text = (EXAMPLES / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.MULTILINE))
    assert len(options) == text.count("\n#SBATCH ")
    name, seconds = re.fullmatch(r"([A-Z0-9]+)@(\d+)", options["signal"]).groups()  # not B:, which is for the script
    assert signal.Signals[f"SIG{name}"] in END_SIGNALS
    assert f"{seconds} seconds" in PAGE
    assert {"requeue", "open-mode"} <= set(options)
    # For a process per GPU, the command line says otherwise: as many cores, and no other option than the file has.
    command = re.search(r"^sbatch (--.*) examples/slurm.sbatch$", PAGE, flags=re.MULTILINE)[1]
    others = dict(word.removeprefix("--").split("=") for word in command.split())
    assert set(others) <= set(options)
    tasks, cores = (int(others[name]) for name in ("ntasks-per-node", "cpus-per-task"))
    assert tasks == int(options["gpus-per-node"])
    assert tasks * cores == int(options["ntasks-per-node"]) * int(options["cpus-per-task"])


# --- TPU pod slices ---

# A host is the folder `host`; the state of the slice is in `state`. A training ends with the next line of `statuses`;
# at `preempt`, the slice is gone and its host empty; at `wait`, it ends at a signal.
FAKE_PYTHON = r"""#!/bin/bash
printf '%s\0' .venv/bin/python "$@" >> ../../calls; printf '\n\0' >> ../../calls
{ read -r status; cat > ../../rest; } < ../../statuses
mv ../../rest ../../statuses
if [ "$status" = preempt ]; then
  echo PREEMPTED > ../../state
  rm -r ../../host
  exit 1
fi
if [ "$status" = wait ]; then
  trap "exit 75" TERM
  for i in {1..1500}; do sleep 0.02; done
fi
exit "$status"
"""
FAKES = {
    "gcloud": """
      case $4 in
        create) mkdir -p host; echo READY > state ;;
        delete) rm state ;;
        describe) cat state ;;
        ssh) cd host 2> /dev/null && bash -c "${@: -1}" ;;
      esac""",
    "git": 'mkdir -p "$3/.venv/bin"; cp ../python "$3/.venv/bin/python"',
    "pgrep": "",
    # Of all processes, those of the host alone.
    "pkill": """
      for folder in /proc/[0-9]*; do
        [[ "$folder/cwd" -ef jax-flow-matching ]] || continue
        mapfile -d '' words < "$folder/cmdline"
        [[ "${words[*]}" =~ $3 ]] && kill "$1" "${folder#/proc/}"
      done
      true""",
    **dict.fromkeys(("make", "sudo", "tail"), ""),
    "mountpoint": "exit 1",
    "cp": '/bin/cp "$@"; /bin/chmod +x "${@: -1}"',
}


def wait_for(is_true):
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def verbs(calls):
    """The calls of gcloud and of the training by what they do, without those that only ask."""
    names = [call[4] if call[0] == "gcloud" else call[1] for call in calls if call[0] in ("gcloud", ".venv/bin/python")]
    return [name for name in names if name not in ("ssh", "describe")]


@pytest.fixture
def use_slice(run_script, tmp_path):
    """use_slice(word, statuses) -> (done, calls) of tpu_pod.sh, with a slice whose trainings end with these."""

    def use(word, statuses=()):
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        (tmp_path / "python").write_text(FAKE_PYTHON)
        return run_script(EXAMPLES / "tpu_pod.sh", [word], FAKES, {"PAUSE": "0.02", "SPOT": "1"})

    return use


def test_a_tpu_slice_is_made_again_until_the_training_has_ended(use_slice, read_training):
    done, calls = use_slice("keep", [EXIT_STOPPED, "preempt", 0])
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["create", *["train_flow.py"] * 2, "delete", "create", "train_flow.py"]
    assert {tuple(call[5:8]) for call in calls if call[0] == "gcloud"} == {("dit-b", "--zone", "us-central2-b")}
    assert all("--spot" in call for call in calls if call[:1] + call[4:5] == ["gcloud", "create"])
    for call in calls:
        if call[0] == ".venv/bin/python":
            assert read_training(call).coordinator_address == "auto"
        if call[0] == "sudo":
            assert call[1:] in (["mkdir", "-p", "/shared"], ["mount", "FILESTORE_IP:/share", "/shared"])
        if call[0] == "make":
            assert call[-4:] == ["setup", "DEVICE=tpu", "EXTRAS=tfds", "PYTHON=python3.11"]


def test_an_error_of_the_training_ends_the_loop(use_slice):
    done, calls = use_slice("keep", [1])
    assert done.returncode == 1
    assert "ended with status 1: see" in done.stderr
    assert verbs(calls) == ["create", "train_flow.py"]


def test_a_training_on_a_tpu_slice_that_is_stopped_leaves_its_status(use_slice, tmp_path):
    """The shell that waits for it has its command line, and gets the signal, too."""
    log, status = tmp_path / "calls", tmp_path / "host" / "jax-flow-matching" / "train.status"
    use_slice("create")
    use_slice("train", [4])
    wait_for(status.exists)
    use_slice("train", ["wait"])
    wait_for(lambda: log.read_text().count(".venv/bin/python\0train_flow.py") == 2)
    time.sleep(0.1)  # until it has its handler
    assert not status.exists()  # that of the first
    use_slice("stop")
    wait_for(status.exists)
    wait_for(status.read_text)
    assert status.read_text() == f"{EXIT_STOPPED}\n"


@pytest.mark.parametrize("word", ["create", "log", "delete", "", "starts"])
def test_the_other_words_of_the_tpu_script(use_slice, word, tmp_path):
    (tmp_path / "host").mkdir()
    (tmp_path / "state").touch()
    done, calls = use_slice(word)
    names = [call[0] for call in calls]
    if word in ("", "starts"):
        assert (done.returncode, calls) == (2, [])
        assert "examples/tpu_pod.sh keep" in done.stderr
        assert "set -e" not in done.stderr
    else:
        expected = {"create": "make", "log": "tail", "delete": "gcloud"}[word]
        assert expected in names
        assert done.returncode == 0, done.stderr


# --- Kubernetes ---


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict]:
    documents = list(yaml.safe_load_all((EXAMPLES / "gke_job.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_the_pods_of_the_job_find_each_other(manifests, run_script, read_training, tmp_path):
    job, service = manifests["Job"], manifests["Service"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["apiVersion"], service["apiVersion"]) == ("batch/v1", "v1")
    # A headless service for the pods of this job, which have its name as their domain.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"

    # The command of a pod, once the name of pod 0 is known: at the third try.
    known = f"echo >> {tmp_path}/asked; mapfile -t n < {tmp_path}/asked; [ ${{#n[@]}} -ge 3 ]"
    assert container["command"] == ["bash", "-c"]
    assert "\nexec python " in container["args"][0]  # a shell would keep signals to itself
    fakes = {"getent": known, "sleep": "", "python": f"exit {EXIT_STOPPED}"}
    done, calls = run_script(container["args"][0], (), fakes, {"JOB_COMPLETION_INDEX": "1"})
    assert done.returncode == EXIT_STOPPED, done.stderr
    name = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    asked = [call for call in calls if call[0] == "getent"]
    assert asked == [["getent", "hosts", name]] * 3
    config = read_training(calls[-1])
    assert config.coordinator_address.startswith(f"{name}:")
    assert (config.num_processes, config.process_id) == (job["spec"]["completions"], 1)
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    for index in range(job["spec"]["completions"]):
        check_numbers("", config.num_processes, index, None)


def test_the_job_replaces_pods_that_have_saved(manifests):
    spec = manifests["Job"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    saved, gone = spec["podFailurePolicy"]["rules"]
    assert {saved["action"], gone["action"]} == {"Ignore"}  # does not count, and is replaced
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [EXIT_STOPPED]}
    assert gone["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # or there may be no such policy
    assert f"{pod['terminationGracePeriodSeconds']} seconds" in PAGE
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_that_is_stopped_while_it_waits_is_replaced(manifests, run_script):
    script = manifests["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    fakes = {"getent": "exit 2", "sleep": "kill -TERM $PPID"}
    done, _ = run_script(script, (), fakes)
    assert done.returncode == EXIT_STOPPED


# --- Spot machines ---


def test_a_command_is_started_again_while_it_ends_with_that_status(run_script, tmp_path):
    (tmp_path / "statuses").write_text(f"{EXIT_STOPPED}\n{EXIT_STOPPED}\n4\n")
    body = "{ read -r status; cat > rest; } < statuses; mv rest statuses; exit $status"
    done, calls = run_script(EXAMPLES / "spot.sh", ["train", "--name", "two words"], {"train": body}, {"PAUSE": "0"})
    assert (done.returncode, calls) == (4, [["train", "--name", "two words"]] * 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_loop_stops_the_command_and_starts_none(tmp_path, number):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(75))); "
        "print('ready', flush=True); time.sleep(60)"
    )
    loop = subprocess.Popen([EXAMPLES / "spot.sh", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert loop.stdout.readline() == "ready\n"
    loop.send_signal(number)
    assert loop.wait(30) == EXIT_STOPPED
    assert loop.stdout.read() == ""


def test_a_loop_without_a_command_says_how_to_use_it(run_script):
    done, _ = run_script(EXAMPLES / "spot.sh")
    assert done.returncode == 2
    assert "usage: " in done.stderr


def test_the_unit_of_a_spot_machine(read_training):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(EXAMPLES / "spot.service")
    service = unit["Service"]
    python, *words = shlex.split(service["ExecStart"].replace("\\\n", " "))
    assert python == f"{service['WorkingDirectory']}/.venv/bin/python"
    config = read_training([python, *words])
    assert int(service["RestartForceExitStatus"]) == EXIT_STOPPED
    assert signal.Signals[service["KillSignal"]] in END_SIGNALS
    assert f"{service['TimeoutStopSec']} of the 30 seconds" in PAGE
    assert Path(config.save_dir).is_relative_to(unit["Unit"]["RequiresMountsFor"])


# --- The sweep ---


@pytest.fixture
def sweep(tmp_path):
    """sweep(answer, **variables) -> (exit status, output): sweep.sh, whose programs are answered by answer(words), a
    subprocess.CompletedProcess: those that it would start take seconds to import JAX."""
    shim = tmp_path / "python"
    shim.write_text(
        f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/asking; mv {tmp_path}/asking {tmp_path}/asked\n"
        f"until [ -e {tmp_path}/status ]; do sleep 0.01; done\nread -r status < {tmp_path}/status\n"
        f"rm {tmp_path}/status; exit $status\n"
    )
    shim.chmod(0o755)

    def run(answer, **variables):
        environment = {**os.environ, "PYTHON": str(shim), "RUNS": str(tmp_path / "runs"), **variables}
        script = subprocess.Popen([EXAMPLES / "sweep.sh"], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
        output = ""
        while script.poll() is None:
            time.sleep(0.01)
            if (tmp_path / "asked").exists():
                words = (tmp_path / "asked").read_text().split("\0")[:-1]
                (tmp_path / "asked").unlink()
                done = answer(words)
                output += done.stdout + done.stderr
                (tmp_path / "answer").write_text(f"{done.returncode}\n")
                (tmp_path / "answer").rename(tmp_path / "status")
        return script.returncode, output

    return run


def test_the_sweep_trains_four_settings_and_compares_them(sweep, read_flags, tmp_path):
    asked = []

    def answer(words):
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    assert sweep(answer, STEPS="1e3", FLAGS="--seed 3")[0] == 0
    configs = [read_flags(train_flow, words[1:]) for words in asked[:-1]]
    assert [words[0] for words in asked] == ["train_flow.py"] * 4 + ["plot_metrics.py"]
    assert len({(config.model.lr, config.model.depth) for config in configs}) == 4
    assert len({config.save_dir for config in configs}) == 4
    assert {(config.max_steps, config.seed) for config in configs} == {(1000, 3)}
    table = read_flags(plot_metrics, asked[-1][1:])
    assert (table.runs, table.table) == ([f"{tmp_path}/runs/*"], True)


def test_the_sweep_ends_where_a_training_is_stopped(sweep):
    asked = []

    def answer(words):
        asked.append(words)
        return subprocess.CompletedProcess(words, EXIT_STOPPED if len(asked) == 2 else 0, "", "")

    assert sweep(answer)[0] == EXIT_STOPPED
    assert len(asked) == 2


SMALL = {"DEPTHS": "1", "WIDTH": "32", "FLAGS": "--eval_interval 0 --batch_size 16"}


def read_table(output):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line[:1] == "|"]


def test_a_sweep_of_one_small_setting(sweep, tmp_path):
    status, output = sweep(lambda words: run_program(*words, check=False), **SMALL, STEPS="1", RATES="1e-3")
    assert status == 0, output
    names, _, cells = read_table(output)
    assert names[:4] == ["run", "step", "seconds", "parameters"]
    assert cells[:2] == ["depth1-lr1e-3", "1"]
    assert (tmp_path / "runs" / "table.md").read_text() in output


@pytest.mark.slow
def test_a_sweep_that_is_given_again_continues(sweep):
    for steps, rates in (("1", "1e-3"), ("2", "1e-3 3e-4")):
        status, output = sweep(lambda words: run_program(*words, check=False), **SMALL, STEPS=steps, RATES=rates)
        assert status == 0, output
    assert "resuming" in output
    names, _, *rows = read_table(output)
    assert names[:3] == ["run", "model.lr", "step"]
    assert [row[:3] for row in rows] == [["depth1-lr1e-3", "0.001", "2"], ["depth1-lr3e-4", "0.0003", "2"]]
