"""Put each bundle in a folder into a Secret of this namespace: publish.py FOLDER

server.json becomes the Secret fedbus-server, worker.json fedbus-worker, NAME.json fedbus-client-NAME, each with the key
"bundle". By server-side apply, as the pod's own service account: a Secret that is there already is replaced.
"""

import base64
import json
import os
import re
import ssl
import sys
import urllib.request
from pathlib import Path

API = os.environ.get("FEDBUS_KUBERNETES", "https://kubernetes.default.svc")
ACCOUNT = Path(os.environ.get("FEDBUS_SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))


def name_of(bundle: Path) -> str:
    """The Secret's name: in a client id there may be letters that none may have."""
    if bundle.stem in ("server", "worker"):
        return f"fedbus-{bundle.stem}"
    return "fedbus-client-" + re.sub(r"[^a-z0-9-]", "-", bundle.stem.lower()).strip("-")


def secret_of(bundle: Path) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name_of(bundle), "labels": {"app.kubernetes.io/part-of": "fedbus"}},
        "data": {"bundle": base64.b64encode(bundle.read_bytes()).decode()},
    }


def apply(secret: dict[str, object], name: str) -> None:
    namespace = (ACCOUNT / "namespace").read_text().strip()
    request = urllib.request.Request(
        f"{API}/api/v1/namespaces/{namespace}/secrets/{name}?fieldManager=fedbus&force=true",
        method="PATCH",
        data=json.dumps(secret).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/apply-patch+yaml",
        },
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if API.startswith("https") else None
    with urllib.request.urlopen(request, context=trust, timeout=30):
        sys.stdout.write(f"Secret {name}\n")


def main() -> None:
    bundles = sorted(Path(sys.argv[1]).glob("*.json"))
    names = [name_of(bundle) for bundle in bundles]
    if len(set(names)) < len(names):
        sys.exit("two client ids become one name of a Secret: they differ in more than letters, digits and hyphens")
    for bundle, name in zip(bundles, names, strict=True):
        apply(secret_of(bundle), name)


main()
