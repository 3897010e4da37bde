"""The files of deploy/ are what the tools that read them take: each by its own checker, as far as one runs without its service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=60)


def spoiled(file: str, old: str, new: str, folder: Path) -> Path:
    """A copy of a file with a mistake in it: its checker must find that."""
    text = (DEPLOY / file).read_text()
    assert old in text
    copy = folder / file
    copy.write_text(text.replace(old, new))
    return copy


def test_compose_knows_every_word_of_the_compose_file(tmp_path: Path) -> None:
    check = (BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    assert run(*check, DEPLOY / "compose.yaml").returncode == 0
    assert "healthchek" in run(*check, spoiled("compose.yaml", "healthcheck:", "healthchek:", tmp_path)).stdout


def test_what_the_compose_file_depends_on_is_there_and_can_be_healthy() -> None:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"postgres", "prefect", "mlflow", "deploy", "cpu-worker", "gpu-worker"}
    for service in services.values():
        for other, condition in service.get("depends_on", {}).items():
            assert condition["condition"] != "service_healthy" or "healthcheck" in services[other]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_every_variable_of_the_compose_file_is_in_the_example() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    assert asked == offered


def test_no_password_is_in_a_command_line_of_the_compose_file() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert not any("PASSWORD" in str(service.get(part)) for service in services.values() for part in ("command", "healthcheck"))


def test_hadolint_has_nothing_to_say_about_the_dockerfile(tmp_path: Path) -> None:
    assert run(BIN / "hadolint", DEPLOY / "Dockerfile").stdout == ""
    assert "DL3042" in run(BIN / "hadolint", spoiled("Dockerfile", " --no-cache-dir", "", tmp_path)).stdout


def test_the_image_finds_what_it_copies() -> None:
    copied = [part for line in re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE) for part in line.split()]
    kept = re.findall(r"^!(.*)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there; it comes with systemd")
    unit = "gpt2-worker@.service"
    here = spoiled(unit, "/srv/gpt2/.venv/bin", str(BIN), tmp_path)
    verified = run("systemd-analyze", "verify", "--man=no", here)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    here.write_text(here.read_text().replace("KillMode=mixed", "KillMode=mixd"))
    assert "kill mode" in run("systemd-analyze", "verify", "--man=no", here).stderr


def test_bash_and_shellcheck_take_the_slurm_script(tmp_path: Path) -> None:
    assert run("bash", "-n", DEPLOY / "worker.slurm").returncode == 0
    assert run(BIN / "shellcheck", DEPLOY / "worker.slurm").stdout == ""
    assert "SC2086" in run(BIN / "shellcheck", spoiled("worker.slurm", '"runs/$1"', "runs/$1", tmp_path)).stdout
    text = (DEPLOY / "worker.slurm").read_text()
    after_comments = text.index("set -u")
    assert all(place.start() < after_comments for place in re.finditer("^#SBATCH", text, re.MULTILINE)), "sbatch reads no further"


def test_prefect_makes_a_job_with_gpus_of_the_kubernetes_template() -> None:
    from prefect.utilities.templating import apply_values

    template = json.loads((DEPLOY / "kubernetes.json").read_text())
    asked = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    variables = template["variables"]["properties"]
    assert asked == set(variables)
    defaults = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    pod = apply_values(template["job_configuration"], {**defaults, "gpus": 2, "claim": "mine"})["job_manifest"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "mine"}
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "gpt2"}}]
