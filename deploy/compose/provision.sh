#!/bin/sh
# The federation, and a bundle for each member: provision.sh FEDERATION CLIENT,CLIENT,... HOST:PORT MANAGEMENT_HOST:PORT
#
# All bundles lie in $home/bundles; those of the server, the workers and the first client also where their services
# look for them, alone. Who is a member already stays as it is, so it may be run again with more clients.
set -eu
home=${FEDBUS_HOME:-/var/lib/fedbus}
umask 077

FEDBUS_MANAGEMENT_PASSWORD=$(cat "$home/office/admin.password")
export FEDBUS_MANAGEMENT_PASSWORD SSL_CERT_FILE="$home/office/ca.pem"
fedbus broker provision "$1" --clients "$2" --workers --host "$3" --management "https://admin@$4" \
    --authority "$home/office" --out "$home/bundles"

cp "$home/bundles/server.json" "$home/for/server/bundle.json"
cp "$home/bundles/worker.json" "$home/for/worker/bundle.json"
cp "$home/bundles/${2%%,*}.json" "$home/for/client/bundle.json"
