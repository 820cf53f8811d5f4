# Sourced by the scripts beside it: `fedbus_setup demo|dev` makes sure of RabbitMQ, .venv and the package.
# shellcheck shell=bash
# bash 3.2 (macOS) must understand every line. Nothing here runs before fedbus_setup is called.

FEDBUS_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FEDBUS_VENV=$FEDBUS_ROOT/.venv
FEDBUS_CPU_TORCH=https://download.pytorch.org/whl/cpu

say() { printf 'fedbus: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# fedbus_setup EXTRA [no-rabbitmq]: EXTRA is demo or dev; dev holds all of demo.
fedbus_setup() {
    # Homebrew's folder is not on the PATH of every shell (ssh, cron).
    if [ -d /opt/homebrew/bin ]; then PATH=$PATH:/opt/homebrew/bin; fi
    if [ "${2:-}" != no-rabbitmq ]; then ensure_rabbitmq; fi
    if ! package_is_ready "$1"; then
        ensure_venv
        install_package "$1"
    fi
}

# --- RabbitMQ -------------------------------------------------------------------------------------

rabbitmq_is_there() {
    local folder
    if [ -n "${FEDBUS_RABBITMQ:-}" ]; then return 0; fi # fedbus itself says what is wrong with it
    for folder in /usr/lib/rabbitmq/bin /usr/lib/rabbitmq/sbin \
        "${HOMEBREW_PREFIX:-/opt/homebrew}/opt/rabbitmq/sbin" /opt/homebrew/opt/rabbitmq/sbin \
        /usr/local/opt/rabbitmq/sbin /home/linuxbrew/.linuxbrew/opt/rabbitmq/sbin; do
        if [ -x "$folder/rabbitmq-server" ]; then return 0; fi
    done
    # On Linux a rabbitmq-server on PATH may be a wrapper that refuses other users: its settings must lie beside it.
    folder=$(command -v rabbitmq-server) && [ -f "$(dirname "$(readlink -f "$folder")")/rabbitmq-env" ]
}

ensure_rabbitmq() {
    if rabbitmq_is_there; then return 0; fi
    if has apt-get; then
        say "installing RabbitMQ (apt) ..."
        apt_install rabbitmq-server
    elif has brew; then
        say "installing RabbitMQ (brew) ..."
        brew_install rabbitmq
    else
        die "RabbitMQ is missing, and this system has neither apt nor Homebrew: install RabbitMQ 3.10 or newer" \
            "(on a Mac: https://brew.sh, then 'brew install rabbitmq'), or set FEDBUS_RABBITMQ to its sbin folder"
    fi
    rabbitmq_is_there || die "RabbitMQ was installed, but its rabbitmq-server is not where it should be"
}

# For the tests of metrics and alerts, which skip where it is missing.
ensure_prometheus() {
    if has prometheus && has promtool; then return 0; fi
    if has apt-get; then
        say "installing Prometheus (apt) ..."
        apt_install prometheus
    elif has brew; then
        say "installing Prometheus (brew) ..."
        brew_install prometheus
    fi
}

has() { command -v "$1" >/dev/null 2>&1; }

brew_install() {
    HOMEBREW_NO_AUTO_UPDATE=1 brew install --quiet "$@" >&2 ||
        die "Homebrew could not install $*: see above, or run 'brew update' and try again"
}

# The part that runs as root. The system's own broker and epmd must not come up with the installation (fedbus runs
# private nodes), so a policy denies it; where there is a policy already, that one decides. Units are disabled only
# when they came with this installation.
# shellcheck disable=SC2016
FEDBUS_AS_ROOT='
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d log=$(mktemp) ours= units=
finish() { rm -f "$log"; if [ -n "$ours" ]; then rm -f "$policy"; fi; }
trap finish EXIT
trap "exit 130" INT TERM HUP
if [ ! -e "$policy" ]; then
    ours=yes
    printf "#!/bin/sh\nexit 101\n" >"$policy"
    chmod 755 "$policy"
fi
for unit in rabbitmq-server.service epmd.service epmd.socket prometheus.service; do
    if [ ! -e "/lib/systemd/system/$unit" ]; then units="$units $unit"; fi
done
install() { apt-get install -y -q --no-install-recommends "$@" </dev/null >"$log" 2>&1; }
if ! install "$@"; then # no package lists, or old ones
    apt-get update -q </dev/null >"$log" 2>&1 || true
    install "$@" || { tail -n 15 "$log" >&2; exit 1; }
fi
if [ -d /run/systemd/system ]; then
    for unit in $units; do
        if [ -e "/lib/systemd/system/$unit" ]; then systemctl --quiet disable --now "$unit" || true; fi
    done
fi
'

apt_install() {
    if [ "$(id -u)" = 0 ]; then
        sh -c "$FEDBUS_AS_ROOT" sh "$@"
    elif has sudo; then
        sudo sh -c "$FEDBUS_AS_ROOT" sh "$@"
    else
        die "$* must be installed by root, and there is no sudo: run 'apt-get install $*' as root, then try again"
    fi || die "apt could not install $*: install it yourself (as root: apt-get install $*), then try again"
}

# --- Python ---------------------------------------------------------------------------------------

# Print a Python that can make virtual environments: the user's own first. The constraints were tried with 3.11 to
# 3.13; a newer one is the last resort.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if is_python "$name" "(3, 14)"; then command -v "$name"; return 0; fi
    done
    for name in python3 python3.14; do
        if is_python "$name" "(4,)"; then command -v "$name"; return 0; fi
    done
    return 1
}

is_python() {
    "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < $2)" 2>/dev/null
}

ensure_python() {
    if find_python >/dev/null; then return 0; fi
    if has apt-get; then
        say "installing Python's venv module (apt) ..."
        apt_install python3 python3-venv
    elif has brew; then
        say "installing Python (brew) ..."
        brew_install python@3.13
    fi
    find_python >/dev/null || die "fedbus needs Python 3.11 or newer with its venv module, and found none:" \
        "install it (Debian 12, Ubuntu 24.04: apt install python3-venv; macOS: brew install python@3.13)"
}

ensure_venv() {
    if "$FEDBUS_VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then return 0; fi
    ensure_python
    say "creating .venv ..."
    "$(find_python)" -m venv --clear "$FEDBUS_VENV" || die "the virtual environment $FEDBUS_VENV could not be made"
}

# --- The package ----------------------------------------------------------------------------------

# What an installation depends on; the path too, because an editable installation points at it.
package_key() {
    {
        printf '%s\n' "$FEDBUS_ROOT"
        cat "$FEDBUS_ROOT/pyproject.toml" "$FEDBUS_ROOT/deploy/constraints.txt" "$FEDBUS_VENV/pyvenv.cfg"
    } | cksum
}

package_is_ready() {
    local stamp=$FEDBUS_VENV/.fedbus-setup installed
    if [ ! -x "$FEDBUS_VENV/bin/python" ] || [ ! -f "$stamp" ]; then return 1; fi
    installed=$(cat "$stamp")
    [ "$installed" = "$1 $(package_key)" ] || [ "$installed" = "dev $(package_key)" ]
}

install_package() {
    rm -f "$FEDBUS_VENV/.fedbus-setup"
    ensure_recent_pip
    install_torch
    say "installing fedbus and what it needs ..."
    pip_install -c "$FEDBUS_ROOT/deploy/constraints.txt" -e "${FEDBUS_ROOT}[$1]" ||
        die "pip could not install fedbus: see above, then try again"
    printf '%s %s\n' "$1" "$(package_key)" >"$FEDBUS_VENV/.fedbus-setup"
}

pip_install() {
    "$FEDBUS_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" >&2
}

# Before 23.2 a dry run downloads every file that it only wants to name.
ensure_recent_pip() {
    local check='import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (23, 2))'
    if ! "$FEDBUS_VENV/bin/python" -c "$check"; then
        pip_install --upgrade pip || die "pip could not update itself: is the network there?"
    fi
}

# On Linux PyPI's torch may bring gigabytes of CUDA along. Without an NVIDIA GPU PyTorch's own CPU build does the same.
install_torch() {
    local pin
    if "$FEDBUS_VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then return 0; fi
    if [ "$(uname -s)" != Linux ] || has nvidia-smi; then return 0; fi
    pin=$(grep '^torch==' "$FEDBUS_ROOT/deploy/constraints.txt")
    if wants_cuda "$pin"; then
        say "installing PyTorch (CPU build) ..."
        pip_install --no-deps --retries 1 --index-url "$FEDBUS_CPU_TORCH" "$pin" ||
            die "PyTorch's CPU build could not be fetched from $FEDBUS_CPU_TORCH: open the way there, or install the" \
                "build of your choice with '.venv/bin/pip install $pin' (gigabytes of CUDA from PyPI), and try again"
    fi
}

wants_cuda() {
    local report
    report=$("$FEDBUS_VENV/bin/python" -m pip install --dry-run --report - --quiet --disable-pip-version-check \
        --no-input -c "$FEDBUS_ROOT/deploy/constraints.txt" "$1" 2>/dev/null) || return 1 # pip says why later on
    printf '%s' "$report" | grep -E '"name": *"(nvidia|cuda)[-_]' >/dev/null # not -q: a closed pipe fails under pipefail
}
