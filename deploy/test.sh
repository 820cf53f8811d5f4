#!/usr/bin/env bash
# Set everything up (RabbitMQ, .venv, the package) and run the tests: deploy/test.sh [arguments of pytest]
set -euo pipefail

# shellcheck source=deploy/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

fedbus_setup dev
cd "$FEDBUS_ROOT"
# Two workers, because half of the time is waiting for brokers, leases and processes; -n 0 for one test after the other.
exec "$FEDBUS_VENV/bin/python" -m pytest -n 2 --dist loadgroup "$@"
