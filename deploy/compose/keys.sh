#!/bin/sh
# What the broker needs before it can start: keys.sh HOST... (the names under which it is reached).
#
# The authority and its key stay in $home/office, mode 0700; the broker gets its certificate, and an administrator whom only
# provision.sh knows, in folders that its group may read. Run again it renews the certificate and changes nothing else.
set -eu
home=${FEDBUS_HOME:-/var/lib/fedbus}
umask 077

fedbus broker certificate "$@" --authority "$home/office"

umask 027
for name in ca.pem broker.pem broker.key; do
    cp "$home/office/$name" "$home/tls/.$name"
    chmod 640 "$home/tls/.$name"
    mv "$home/tls/.$name" "$home/tls/$name"
done

if [ ! -e "$home/office/admin.password" ]; then
    (umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(32), end="")' >"$home/office/admin.password")
fi
# With definitions to load RabbitMQ makes no user guest; these make one administrator instead.
printf '{"users": [{"name": "admin", "password": "%s", "tags": "administrator"}]}\n' \
    "$(cat "$home/office/admin.password")" >"$home/definitions/admin.json"
