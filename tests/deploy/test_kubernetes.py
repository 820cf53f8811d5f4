"""deploy/kubernetes: resources that a cluster takes, with nothing open that need not be."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.deploy.files import DEPLOY, KUBERNETES, OVERLAY, Document, kubernetes, pods, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports are deprecated ones
    import kubernetes_validate

_CUSTOM: dict[str, Any] = {
    "RabbitmqCluster": {
        "replicas": {"const": 3},
        "image": {"type": "string"},
        "persistence": {"type": "object", "required": ["storage"]},
        "resources": {"type": "object", "required": ["requests", "limits"]},
        "tls": {
            "type": "object",
            "properties": {
                "secretName": {"type": "string"},
                "caSecretName": {"type": "string"},
                "disableNonTLSListeners": {"const": True},
            },
            "additionalProperties": False,
            "minProperties": 3,
        },
        "rabbitmq": {
            "type": "object",
            "properties": {"additionalPlugins": {"type": "array"}, "additionalConfig": {"type": "string"}},
            "additionalProperties": False,
        },
        "affinity": {"type": "object", "required": ["podAntiAffinity"]},
        "terminationGracePeriodSeconds": {"type": "integer"},
    },
    "ScaledObject": {
        "scaleTargetRef": {"type": "object", "required": ["name"]},
        "minReplicaCount": {"type": "integer", "minimum": 0},
        "maxReplicaCount": {"type": "integer", "minimum": 2},
        "pollingInterval": {"type": "integer"},
        "cooldownPeriod": {"type": "integer"},
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "rabbitmq"},
                    "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
                    "authenticationRef": {"type": "object", "required": ["name"]},
                },
                "additionalProperties": False,
                "minProperties": 3,
            },
        },
    },
    "TriggerAuthentication": {
        "secretTargetRef": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("parameter", "name", "key")},
                "additionalProperties": False,
                "minProperties": 3,
            },
        }
    },
    "PodMonitor": {
        "selector": {"type": "object", "required": ["matchLabels"]},
        "podMetricsEndpoints": {"type": "array", "items": {"type": "object", "required": ["port"]}},
    },
}
"""The `spec` of each custom resource, as far as it is used here: fields as their operators document them."""


def test_every_resource_has_the_shape_that_its_api_takes() -> None:
    for document in kubernetes():
        if document["kind"] in _CUSTOM:
            schema = {"type": "object", "properties": _CUSTOM[document["kind"]], "additionalProperties": False}
            Draft202012Validator(schema).validate(document["spec"])
        else:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    """What `kubectl apply -k` of the example overlay would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    copy = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    secrets = copy / "overlays" / "example" / "secrets"
    secrets.mkdir()
    for name in ("ca.pem", "ca.key", "broker.pem", "broker.key", "scaler.password"):
        (secrets / name).write_text(f"{name} of a test")
    made = subprocess.run(["kubectl", "kustomize", copy / "overlays" / "example"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def test_the_overlay_builds_and_is_valid(built: list[Document]) -> None:
    for document in built:
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "fedbus"
        if document["kind"] not in _CUSTOM:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_every_secret_and_config_that_a_pod_mounts_is_made_by_somebody(built: list[Document]) -> None:
    made = {(each["kind"], each["metadata"]["name"]) for each in built}
    made.add(("Secret", "fedbus-broker-default-user"))  # by the RabbitMQ operator
    made |= {("Secret", f"fedbus-{who}") for who in ("server", "worker", "client-a")}  # by publish.py
    for name, pod in pods(built):
        for volume in pod["spec"]["volumes"]:
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in made, name
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made, name
    images = {container["image"] for _, pod in pods(built) for container in pod["spec"]["containers"]}
    assert images == {"registry.example.org/fedbus:0.1.0"}


def test_every_pod_meets_the_restricted_standard() -> None:
    """Kubernetes' own words for it: Pod Security Standards, "Restricted"."""
    found = pods(kubernetes())
    assert len(found) == 4
    for name, pod in found:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert name == "fedbus-provision" or spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["readOnlyRootFilesystem"] is True, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name


def test_no_secret_is_in_an_environment() -> None:
    for name, pod in pods(kubernetes()):
        for container in pod["spec"]["containers"]:
            assert all("valueFrom" not in variable for variable in container.get("env", ())), name


def test_members_are_probed_where_they_answer() -> None:
    for name, pod in pods(kubernetes()):
        (container,) = pod["spec"]["containers"]
        if name != "fedbus-provision":
            assert container["ports"] == [{"name": "metrics", "containerPort": 9464}], name
            assert container["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}, name
            assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}, name


def test_nobody_reaches_anybody_unless_a_policy_says_so() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in kubernetes() if each["kind"] == "NetworkPolicy"}
    everything = policies.pop("nothing-by-default")
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, pod in pods(kubernetes()):
        labels = pod["metadata"]["labels"].items()
        chosen = [
            p for p in policies.values() if p["podSelector"] and p["podSelector"]["matchLabels"].items() <= labels
        ]
        assert chosen, name
    plain = {5672, 15672, 15692}
    ports = [
        port["port"]
        for p in policies.values()
        for way in ("ingress", "egress")
        for rule in p.get(way, ())
        for port in rule["ports"]
    ]
    assert not plain & set(ports)


def test_the_broker_has_our_settings() -> None:
    (broker,) = (each for each in kubernetes() if each["kind"] == "RabbitmqCluster")
    there = settings(broker["spec"]["rabbitmq"]["additionalConfig"])
    ours = settings((DEPLOY / "rabbitmq.conf").read_text())
    cluster = settings((DEPLOY / "rabbitmq-cluster.conf").read_text())
    assert there.items() <= {**ours, **cluster}.items()
    of_the_operator = ("listeners.", "management.", "prometheus.", "load_definitions")
    of_its_secrets = {"ssl_options.cacertfile", "ssl_options.certfile", "ssl_options.keyfile"}
    left_out = {key for key in ours if not key.startswith(of_the_operator)} - of_its_secrets - there.keys()
    assert left_out == set()


def test_workers_follow_the_queue_that_the_server_fills() -> None:
    scaled = next(each for each in kubernetes() if each["kind"] == "ScaledObject")["spec"]
    (trigger,) = scaled["triggers"]
    assert scaled["scaleTargetRef"]["name"] == "fedbus-worker"
    assert trigger["metadata"]["queueName"] == "fedbus.work"
    assert trigger["metadata"]["protocol"] == "http"  # AMQP would not count what is being worked on
    worker = next(
        each for each in kubernetes() if each["metadata"]["name"] == "fedbus-worker" and each["kind"] == "Deployment"
    )
    assert "replicas" not in worker["spec"]  # each `apply` would undo what KEDA did


class _Api(ThreadingHTTPServer):
    """The API server's part in a server-side apply."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.taken: list[tuple[str, str, str, Document]] = []


class _Handler(BaseHTTPRequestHandler):
    server: _Api

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.taken.append((self.path, self.headers["Authorization"], self.headers["Content-Type"], body))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None: ...


def test_bundles_become_secrets(tmp_path: Path) -> None:
    for name in ("server", "worker", "Hospital_A"):
        (tmp_path / f"{name}.json").write_text(f"bundle of {name}")
    (tmp_path / "token").write_text("token-of-a-test\n")
    (tmp_path / "namespace").write_text("fedbus")
    with _Api() as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        done = _publish(tmp_path, FEDBUS_KUBERNETES=f"http://127.0.0.1:{api.server_port}")
        api.shutdown()
    assert done.returncode == 0, done.stderr
    path, authorization, content_type, secret = api.taken[0]
    assert path == "/api/v1/namespaces/fedbus/secrets/fedbus-client-hospital-a?fieldManager=fedbus&force=true"
    assert (authorization, content_type) == ("Bearer token-of-a-test", "application/apply-patch+yaml")
    assert base64.b64decode(secret["data"]["bundle"]) == b"bundle of Hospital_A"
    kubernetes_validate.validate(secret, kubernetes_validate.latest_version(), strict=True)
    assert [taken[3]["metadata"]["name"] for taken in api.taken[1:]] == ["fedbus-server", "fedbus-worker"]
    assert "bundle of" not in done.stdout + done.stderr


def test_two_clients_never_share_a_secret(tmp_path: Path) -> None:
    for name in ("a.b", "a_b"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert "one name" in _publish(tmp_path).stderr


def _publish(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KUBERNETES / "base" / "publish.py"), str(folder)]
    return subprocess.run(
        command, env={"FEDBUS_SERVICE_ACCOUNT": str(folder), **env}, capture_output=True, text=True, timeout=30
    )


def test_git_ignores_the_secrets() -> None:
    assert (OVERLAY / ".gitignore").read_text() == "secrets/\n"
