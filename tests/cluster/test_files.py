"""The files of ``cluster/``: one version of Ray in all of them, forms that readers take, commands that are ours."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.docs.pages import ROOT
from tests.docs.test_commands import check_rltune

FOLDER = ROOT / "cluster"
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
YAML_FILES = [path for path in FILES if path.suffix == ".yaml"]
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]

# field names of ray.io/v1, KubeRay 1.6 (its API reference)
GROUP = {"rayStartParams", "template"}
WORKERS = GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas"}
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
JOB = {
    "entrypoint",
    "submissionMode",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "backoffLimit",
    "rayClusterSpec",
}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def short(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def test_every_file_is_in_the_readme_and_every_kind_of_cluster_has_one() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^).][^)]*)\)", text))
    assert linked == {short(path) for path in FILES if path.name != "README.md"}


def test_one_version_of_ray() -> None:
    (version,) = re.findall(r"^ray==(\S+)$", LOCK, flags=re.MULTILINE)
    found = {
        (short(path), number)
        for path in FILES
        for number in re.findall(
            r"(?:rayproject/ray:|rayVersion: ?\"?)(\d+\.\d+\.\d+)", path.read_text(encoding="utf-8")
        )
    }
    assert {number for _, number in found} == {version}
    assert {name for name, _ in found} == {
        "Dockerfile",
        "compose.yaml",
        "kuberay/raycluster.yaml",
        "kuberay/rayjob.yaml",
    }


def commands_in(path: Path) -> list[list[str]]:
    """Every command of rltune in a file, comments included, as words."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"(?<![\w/:#=.-])rltune ((?:sweep|train|doctor|status) [^`|&;#\n]*)", text)
    return [line.replace('"', "").split() for line in found]


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in ("Dockerfile", "rltune.json")], ids=short)
def test_every_command_is_one_that_rltune_takes(path: Path) -> None:
    commands = commands_in(path)
    assert commands
    for words in commands:
        experiments = {"EXPERIMENT": "experiments/mix.yaml", "$experiment": "experiments/mix.yaml"}
        check_rltune([experiments.get(word, word) for word in words])


def test_every_run_on_several_nodes_is_on_the_shared_folder() -> None:
    for path in YAML_FILES:
        for words in commands_in(path):
            if "--address" in words:
                assert words[words.index("--storage") + 1].startswith(("/shared/", "/mnt/cluster_storage/")), path


@pytest.mark.parametrize("path", sorted(FOLDER.glob("ray-up/*.yaml")), ids=short)
def test_ray_takes_its_launcher_s_files(path: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(path), schema)
    broken = {**read(path), "max_worker": 3}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def check_cluster(spec: dict[str, Any]) -> None:
    assert spec.keys() == CLUSTER
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"].keys() == GROUP
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # Kubernetes takes no numbers
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        limits = container["resources"]["limits"]
        assert all(container["resources"]["requests"][name] == value for name, value in limits.items())


def test_kuberay_has_fields_of_the_names_in_the_files() -> None:
    cluster, job = read(FOLDER / "kuberay/raycluster.yaml"), read(FOLDER / "kuberay/rayjob.yaml")
    assert [(document["apiVersion"], document["kind"]) for document in (cluster, job)] == [
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    ]
    check_cluster(cluster["spec"])
    assert job["spec"].keys() == JOB
    check_cluster(job["spec"]["rayClusterSpec"])


def test_compose_has_a_head_and_workers_of_one_image() -> None:
    content = read(FOLDER / "compose.yaml")
    head, worker = content["services"]["head"], content["services"]["worker"]
    assert head["image"] == worker["image"]
    assert "--head" in head["command"]
    assert "--address=head:6379" in worker["command"]
    assert head["environment"]["RAY_AUTH_MODE"] == worker["environment"]["RAY_AUTH_MODE"] == "token"
    assert (FOLDER / head["build"]["context"] / head["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in head["ports"])
    assert {mount.split(":")[0] for mount in head["volumes"]} == content["volumes"].keys()


def test_the_image_is_built_of_files_that_are_there() -> None:
    lines = [line.split() for line in (FOLDER / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    sources = [word for words in lines for word in words[1:-1] if not word.startswith("--")]
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=short)
def test_a_script_is_one_that_bash_reads(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_what_need_not_go_up_with_a_job_stays_here() -> None:
    lines = (ROOT / ".rayignore").read_text().splitlines()
    assert {".venv/", "runs/", "*.safetensors", "!rltune/builtin/weights/**"} <= set(lines)
