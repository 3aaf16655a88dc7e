"""Launch files: their contents, the SLURM script with a stub of SLURM, and torchrun's restart of a run that died."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.recipes import recipe_with, write_corpus, write_tokenizer

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
LATEST = "training.resume_from_checkpoint=latest"  # a repeated launch continues
SETTINGS = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "270", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def options(command: list[str]) -> dict[str, str]:
    """Return torchrun's options, and check the command that it starts."""
    assert command[0] == "torchrun"
    end = command.index("-m")
    assert command[end : end + 2] == ["-m", "linear_llama3.trainer"] and command[end + 2].endswith(".yaml")
    assert command[end + 3 :] == [LATEST]
    return dict(option.removeprefix("--").split("=") for option in command[1:end])


def test_kubernetes_names_and_sizes_agree() -> None:
    """Names of pods, job, service and rendezvous agree; torchrun starts one process per GPU."""
    service, job = documents("kubernetes.yaml")
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    found = options(container["command"])
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    assert found["rdzv_endpoint"] == f"{name}-0.{pod['subdomain']}:29500" and found["rdzv_backend"] == "c10d"
    assert int(found["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(found["nproc_per_node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy demands it"
    assert {variable["name"]: variable["value"] for variable in container["env"]} == SETTINGS
    assert pod["terminationGracePeriodSeconds"] > 270
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_kubeflow_sizes_and_volumes_agree() -> None:
    (job,) = documents("trainjob.yaml")
    trainer = job["spec"]["trainer"]
    assert job["apiVersion"].startswith("trainer.kubeflow.org/") and job["kind"] == "TrainJob"
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    found = options(trainer["command"])
    assert "nnodes" not in found and "nproc_per_node" not in found, "the runtime sets PET_NNODES and PET_NPROC_PER_NODE"
    assert found["rdzv_endpoint"] == "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
    assert {variable["name"]: variable["value"] for variable in trainer["env"]} == SETTINGS
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def run_script(text: str, folder: Path, **environment: str) -> list[str]:
    """Run a shell script and return the arguments that it gives to torchrun."""
    stub(folder, "torchrun", 'printf "%s\\n" "$@" >"$ARGUMENTS"; env >"$ARGUMENTS.env"')
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "ARGUMENTS": str(folder / "arguments")}
    subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=environment, check=True, timeout=30)
    return (folder / "arguments").read_text().splitlines()


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_skypilot_starts_torchrun_on_all_nodes(tmp_path: Path) -> None:
    (task,) = documents("skypilot.yaml")
    assert (ROOT / task["envs"]["RECIPE"]).is_file() and task["num_nodes"] == 2 and task["resources"]["accelerators"]
    given = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "sky-1",
        "RECIPE": "a recipe.yaml",
    }
    arguments = run_script(task["run"], tmp_path, **given)
    assert {f"{name}={value}" for name, value in SETTINGS.items()} < set(
        (tmp_path / "arguments.env").read_text().split()
    )
    assert arguments[-4:] == ["-m", "linear_llama3.trainer", "a recipe.yaml", LATEST]
    assert " ".join(arguments[:-4]) == (
        "--nnodes 2 --nproc_per_node 8 --max_restarts 3 "
        "--rdzv_backend c10d --rdzv_endpoint 10.0.0.1:29500 --rdzv_id sky-1"
    )


SRUN = """
while [[ $1 == --* ]]; do shift; done
for node in $(seq "$SLURM_JOB_NUM_NODES"); do SLURM_PROCID=$((node - 1)) "$@" & nodes+=($!); done
stopped=no
trap 'stopped=yes; kill -TERM "${nodes[@]}"' TERM
wait_all() { status=0; for node in "${nodes[@]}"; do wait "$node" || status=$?; done; }
wait_all
[ $stopped = no ] || wait_all
exit $status
"""
SCONTROL = 'if [ "$1" = show ]; then printf "localhost\\nother\\n"; else echo "$@" >>"$LOG"; fi'


def slurm(folder: Path, job: int = 7) -> dict[str, str]:
    """Return the environment of a cluster of two nodes, both of which are this machine."""
    stub(folder, "srun", SRUN)
    stub(folder, "scontrol", SCONTROL)
    return os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "LOG": str(folder / "requeued"),
    }


@pytest.mark.parametrize(
    ("signalled", "status", "requeued"),
    [
        (True, 1, True),  # stopped in the middle
        (True, 0, False),  # had just finished
        (False, 1, False),  # failed: another time would too
        (False, 0, False),
    ],
)
def test_slurm_requeues_a_job_that_it_stopped(signalled: bool, status: int, requeued: bool, tmp_path: Path) -> None:
    """Both ranks receive SIGTERM and may save; then the job is queued again, unless it has finished."""
    train = f"trap 'kill %1; echo saved; exit {status}' TERM; sleep 30 & touch {tmp_path}/started$SLURM_PROCID; wait"
    stub(tmp_path, "torchrun", train if signalled else f"exit {status}")
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", "recipe.yaml"], env=slurm(tmp_path), stdout=subprocess.PIPE, text=True
    )
    while signalled and not all((tmp_path / f"started{rank}").exists() for rank in range(2)):
        assert job.poll() is None, "ended before it was stopped"
        time.sleep(0.05)
    if signalled:
        job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == status and out.count("saved") == 2 * signalled
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_slurm_requires_a_recipe(tmp_path: Path) -> None:
    done = subprocess.run(["bash", LAUNCH / "slurm.sh"], env=slurm(tmp_path), capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch scripts/launch/slurm.sh RECIPE.yaml" in done.stderr
    text = (LAUNCH / "slurm.sh").read_text()
    for line in ("#SBATCH --signal=B:TERM@300", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=1"):
        assert line in text.splitlines()


DIES_ONCE = """
import os, signal, sys
from transformers import TrainerCallback
from linear_llama3.trainer import __main__ as program

class Dies(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print("begins at", state.global_step, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        died = args.output_dir + "/died"
        if (state.global_step, args.process_index) == (3, 1) and not os.path.exists(died):
            open(died, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

def build(recipe, args, build_trainer=program.build_trainer):
    trainer = build_trainer(recipe, args)
    trainer.add_callback(Dies())
    return trainer

program.build_trainer = build
program.run(program.main)
"""


TORCHRUN = """
import sys
from pathlib import Path
from torch.distributed.run import main

options, module = sys.argv[1:], sys.argv.index("-m") - 1
assert options[module + 1] == "linear_llama3.trainer"
folder = Path(__file__).parent
main([*options[:module], str(folder / "dies.py"), *options[module + 2 :]])
"""


@pytest.mark.slow
def test_slurm_restarts_both_nodes_from_the_checkpoint_after_a_rank_dies(tmp_path: Path) -> None:
    """Two torchruns meet and train one model, each holding half of every row. The rank of one of them is killed in its
    third step. All restart at the checkpoint of the second and finish."""
    write_corpus(tmp_path / "corpus")
    write_tokenizer(tmp_path / "tokenizer")
    recipe = recipe_with(tmp_path, sequence_length=9)
    changes = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2"]
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    with socket.socket() as probe:
        job = next(job for job in range(1000) if probe.connect_ex(("localhost", 29500 + job)) != 0)  # its port is free
    environment = slurm(tmp_path, job) | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    stub(tmp_path, "torchrun", f'exec {sys.executable} {tmp_path}/torchrun.py "$@"')
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    command = ["bash", str(LAUNCH / "slurm.sh"), str(recipe), *changes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 data-parallel x 2 sequence-parallel processes, 6 tokens of every row each") == 2
    assert done.stderr.count("1 of 1 sequence-parallel groups cross nodes of 1 processes") == 2
    assert done.stdout.count("begins at 0") == 2 and done.stdout.count("begins at 2") == 2
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert "torchrun --nproc_per_node 1 --nnodes 2" in (tmp_path / "out" / "README.md").read_text()
