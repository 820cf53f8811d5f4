#!/bin/sh
# The federation on the broker, and a Secret with a bundle for each member:
# provision.sh FEDERATION CLIENT,CLIENT,... HOST:PORT MANAGEMENT_HOST:PORT
#
# Who is a member already stays as it is; what was interrupted is taken up again. The records and the bundles lie in the
# volume at $home: clients that run elsewhere get theirs from there (deploy/README.md).
set -eu
home=${FEDBUS_HOME:-/var/lib/fedbus}
authority=${FEDBUS_AUTHORITY:-/run/authority}
broker=${FEDBUS_BROKER_SECRET:-/run/broker}
umask 077

FEDBUS_MANAGEMENT_PASSWORD=$(cat "$broker/password")
export FEDBUS_MANAGEMENT_PASSWORD SSL_CERT_FILE="$authority/ca.pem"
fedbus broker provision "$1" --clients "$2" --workers --host "$3" --management "https://$(cat "$broker/username")@$4" \
    --ca "$authority/ca.pem" --ca-key "$authority/ca.key" --authority "$home/office" --out "$home/bundles"
exec python3 "$(dirname "$0")/publish.py" "$home/bundles"
