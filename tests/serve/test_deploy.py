"""What deploy/ says of the server is so: its options, routes and ports exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from griffin.serve.guard import OPEN
from tests.serve.conftest import Served

ROOT = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((ROOT / "kubernetes/griffin.yaml").read_text())}


def options() -> set[str]:
    """Of griffin serve."""
    import inspect

    from griffin.cli.serve import serve

    return {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters}


def test_kubernetes_names_what_there_is(manifests: dict[str, Any], served: Served) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {each for each in container["args"] if each.startswith("--")} <= options()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert path in OPEN
        assert served.call(path)[0] == 200
    wait = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert pod["terminationGracePeriodSeconds"] > wait + container["lifecycle"]["preStop"]["sleep"]["seconds"] + 10
    assert (
        manifests["PersistentVolumeClaim"]["metadata"]["name"]
        == pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    )
    assert manifests["PodDisruptionBudget"]["spec"]["selector"] == manifests["Deployment"]["spec"]["selector"]


def test_the_image_is_one_that_can_be(served: Served) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["griffin", "serve"]' in text
    assert "USER 10001" in text
    constraints = (ROOT.parent / "constraints.txt").read_text()
    (version,) = re.findall(r"^torch==([^\s]*)", constraints, re.M)  # what the sed in it finds
    assert re.fullmatch(r"[0-9.]+", version)
    extras = re.findall(r'"\.\[([a-z,]+)\]"', text)[0].split(",")
    project = (ROOT.parent / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)


def test_the_scripts_routes_are_set_by_variables_that_are_read() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("deploy_vertex", ROOT / "vertex/deploy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = module.container("image")
    from griffin.serve.vertex import Vertex

    read = Vertex.of(
        {
            "AIP_MODE": "PREDICTION",
            "AIP_HTTP_PORT": str(told["serving_container_ports"][0]),
            "AIP_HEALTH_ROUTE": told["serving_container_health_route"],
            "AIP_PREDICT_ROUTE": told["serving_container_predict_route"],
        }
    )
    assert read is not None
    assert (read.port, read.health_route, read.predict_route) == (module.PORT, module.HEALTH, module.PREDICT)
    assert 0 < told["serving_container_deployment_timeout"] <= 7200  # Google's limit
