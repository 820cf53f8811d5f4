#!/usr/bin/env bash
# Set everything up (RabbitMQ, .venv, the package) and run the main job: deploy/demo.sh [arguments of `fedbus demo`]
set -euo pipefail

# shellcheck source=deploy/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

rabbitmq=
if [ -n "${FEDBUS_BROKER:-}" ]; then rabbitmq=no-rabbitmq; fi
for argument in "$@"; do
    case $argument in --broker | --broker=*) rabbitmq=no-rabbitmq ;; esac # the broker runs elsewhere
done

fedbus_setup demo "$rabbitmq"
exec "$FEDBUS_VENV/bin/fedbus" demo "$@"
