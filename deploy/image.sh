#!/usr/bin/env bash
# Build the image with podman, docker or buildah, whichever is here: deploy/image.sh [--debian] [arguments of the build]
#
#   deploy/image.sh --build-arg EXTRAS=metrics,provision,torch
#   deploy/image.sh --debian --isolation chroot      # no registry, no engine: the base comes from Debian's own archive
#
# FEDBUS_IMAGE names the result (localhost/fedbus), FEDBUS_ENGINE one of the three. --debian needs root, debootstrap and
# buildah; it makes its base once (localhost/fedbus-base) and takes it again after that.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=${FEDBUS_IMAGE:-localhost/fedbus}
base=localhost/fedbus-base

say() { printf 'fedbus: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

find_engine() {
    local engine
    for engine in ${FEDBUS_ENGINE:-podman docker buildah}; do
        if has "$engine" && "$engine" info >/dev/null 2>&1; then echo "$engine"; return 0; fi
    done
    die "no engine that works: install podman, docker or buildah (Debian, Ubuntu: apt install buildah)"
}

# Debian without anything but Python, as a base image.
make_debian_base() {
    local folder container
    if buildah inspect --type image "$base" >/dev/null 2>&1; then return 0; fi
    has debootstrap || die "--debian needs debootstrap (apt install debootstrap)"
    folder=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$folder'" EXIT
    say "making a base of Debian's packages ..."
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        bookworm "$folder/root" "${FEDBUS_DEBIAN:-http://deb.debian.org/debian}" >"$folder/log" 2>&1 ||
        { tail -n 5 "$folder/log" >&2; die "debootstrap failed"; }
    rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/* "$folder"/root/usr/share/{doc,man,locale}/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder/root" / >/dev/null
    buildah commit --quiet --rm "$container" "$base" >/dev/null
}

arguments=()
if [ "${1:-}" = --debian ]; then
    shift
    FEDBUS_ENGINE=buildah
    has buildah || die "--debian needs buildah (apt install buildah)"
    make_debian_base
    arguments+=(--build-arg "BASE=$base")
fi
engine=$(find_engine)
# Of the three formats only docker's knows health checks.
case $engine in podman | buildah) arguments+=(--format docker) ;; esac
if [ "$engine" = docker ]; then export DOCKER_BUILDKIT=1; fi
revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")

say "building $image with $engine ..."
exec "$engine" build "${arguments[@]}" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
    --file "$root/deploy/Containerfile" --tag "$image" "$@" "$root"
