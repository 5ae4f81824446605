"""The scripts and manifests beside docs/cluster.md: they parse, their commands exist, and the Slurm script does its work."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser

from diffalign.cli import app
from diffalign.config.load import load

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cluster"
PAGE = FOLDER.parent / "cluster.md"
MANIFESTS = ("kubernetes-ray.yaml", "kubernetes-job.yaml", "kubernetes-train.yaml", "ray-cluster.yaml")
SCRIPTS = ("slurm.sh", "slurm-train.sh", "slurm-train-nodes.sh")  # the last two are tried in tests/reliability


def parsed(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def check_command(words: list[str]) -> dict[str, Any]:
    """Return the options of a command; the parser raises for one that does not exist, and so does a recipe."""
    group = typer.main.get_command(app)
    name, verb, *rest = words
    assert name == "diffalign"
    if verb in ("synth", "train"):
        recipe, *overrides = [word for word in rest if not word.startswith("-")]
        load(verb, recipe, overrides)
    return group.commands[verb].make_context(verb, rest).params  # type: ignore[attr-defined]


def test_the_page_names_every_file() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"cluster/{path.name}" in text for path in FOLDER.iterdir())
    assert {path.name for path in FOLDER.iterdir()} == {*MANIFESTS, *SCRIPTS}


def test_the_commands_of_the_ray_job() -> None:
    job = parsed("kubernetes-ray.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    shell, flag, script = shlex.split(job["spec"]["entrypoint"])
    command, _, rest = script.partition(" || ")
    assert (shell, flag, rest) == ("bash", "-c", "[ $? -eq 3 ]")
    options = check_command(shlex.split(command))
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert options["engine"] == "ray" and options["actors"] == workers["maxReplicas"]
    assert (
        cluster["enableInTreeAutoscaling"] and workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    )
    containers = [g["template"]["spec"]["containers"][0] for g in (cluster["headGroupSpec"], workers)]
    assert containers[0]["image"] == containers[1]["image"] and containers[0]["envFrom"] == containers[1]["envFrom"]


def test_the_command_of_the_job() -> None:
    job = parsed("kubernetes-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    check_command(container["command"])
    assert container["volumeMounts"][0]["name"] == spec["volumes"][0]["name"]


def test_the_job_on_several_nodes() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes-train.yaml").read_text(encoding="utf-8"))
    spec, name = job["spec"], job["metadata"]["name"]
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": name}}
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    words = container["command"]
    flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    assert spec["completions"] == spec["parallelism"] == int(flags["--num_machines"])
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert int(flags["--num_processes"]) == spec["completions"] * gpus
    # Pods of an indexed job are called JOB-INDEX, in the subdomain of the service.
    assert (
        flags["--main_process_ip"] == f"{name}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    )
    assert flags["--machine_rank"] == "$(JOB_COMPLETION_INDEX)" and spec["completionMode"] == "Indexed"
    check_command(words[words.index("-m") + 1 :])
    parsed_by_accelerate = launch_command_parser().parse_args(
        [w.replace("$(JOB_COMPLETION_INDEX)", "1") for w in words[2:]]
    )
    assert parsed_by_accelerate.machine_rank == 1 and parsed_by_accelerate.training_script == "diffalign"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "kubernetes-train.yaml"])
def test_kubernetes_takes_the_files(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="part of the test extra")
    for document in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")):
        validator.validate(document, "1.31", strict=True)
        with pytest.raises(validator.ValidationError):
            validator.validate({**document, "spec": {**document["spec"], "nodes": 3}}, "1.31", strict=True)


def test_the_cluster_of_rays_launcher() -> None:
    text = (FOLDER / "ray-cluster.yaml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "ray exec" in line]
    assert check_command(shlex.split(shlex.split(line)[-1]))["engine"] == "ray"
    schemas = pytest.importorskip("jsonschema", reason="comes with Ray (make test-ray)")
    ray = pytest.importorskip("ray", reason="Ray is not installed (make test-ray)")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    schemas.validate(yaml.safe_load(text), schema)
    with pytest.raises(schemas.ValidationError):
        schemas.validate({**yaml.safe_load(text), "nodes": 3}, schema)


PROGRAMS = {
    "hostname": "echo node1",
    "srun": 'echo "$@" >> srun',
    "ray": "[ -f srun ]",  # the head answers once it is started
    "scontrol": 'echo "$@" >> requeued',
    # Ends with 75 on SIGUSR1, and else with the code in a file.
    "diffalign": 'echo "$RAY_ADDRESS $@" > command\ntrap "exit 75" USR1\n'
    "for i in $(seq 200); do [ -f code ] && exit $(cat code); sleep 0.05; done",
}


def start(folder: Path) -> subprocess.Popen[bytes]:
    (folder / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    given = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_NNODES": "4"}
    script = ["bash", str(FOLDER / "slurm.sh"), "my pictures", "-r", "hpsv2"]
    started = subprocess.Popen(script, env=given, cwd=folder)
    while not (folder / "command").is_file() or not (folder / "command").read_text():
        time.sleep(0.02)
    return started


@pytest.mark.parametrize("code", [0, 3])
def test_the_slurm_script_gives_the_code_of_the_command(tmp_path: Path, code: int) -> None:
    started = start(tmp_path)
    (tmp_path / "code").write_text(str(code))
    assert started.wait(timeout=30) == code and not (tmp_path / "requeued").exists()
    address, *words = (tmp_path / "command").read_text().split()
    assert address == "node1:6379" and words == ["score", "my", "pictures", "-r", "hpsv2", "--engine", "ray"]
    check_command(["diffalign", *words])
    head, workers = sorted((tmp_path / "srun").read_text().splitlines(), key=lambda line: "--head" not in line)
    assert "--nodelist=node1" in head and "--head --port=6379" in head
    assert "--nodes=3 --ntasks=3 --exclude=node1" in workers and "--address=node1:6379" in workers


def test_the_slurm_script_requeues_a_command_that_was_stopped(tmp_path: Path) -> None:
    started = start(tmp_path)
    time.sleep(0.2)  # the script sets its trap right after it has started the command
    started.send_signal(signal.SIGUSR1)
    assert started.wait(timeout=30) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
