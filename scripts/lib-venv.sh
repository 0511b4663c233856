# Sourced by the scripts in this folder: finds a Python, creates .venv/ in the checkout and installs the project into it
# (editable) with the requested extras, again after each change of pyproject.toml. Messages go to stderr.
#
#   . "$(dirname "$0")/lib-venv.sh"
#   ensure_cc                 # a C compiler for the emulated driver
#   ensure_venv demo          # sets PY, the Python to use
#
# HIBERNODE_PYTHON=/path/to/python uses that environment unchanged.

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PY=$ROOT/.venv/bin/python

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $1"
    shift
    for fix_line in "$@"; do say "  $fix_line"; done
    exit 1
}

# step LABEL COMMAND...: runs a command without output, prints seconds on stderr, and the end of the output if it fails.
step() {
    step_label=$1
    shift
    step_log=$(mktemp "${TMPDIR:-/tmp}/hibernode-setup.XXXXXX")
    step_start=$(date +%s)
    say "$step_label ..."
    (
        seconds=0
        while :; do
            sleep 5 </dev/null >/dev/null 2>&1
            seconds=$((seconds + 5))
            say "  still running, $seconds s"
        done
    ) &
    step_ticker=$!
    trap 'kill "$step_ticker" 2>/dev/null; rm -f "$step_log"; exit 130' INT TERM
    step_rc=0
    "$@" >"$step_log" 2>&1 </dev/null || step_rc=$?
    kill "$step_ticker" 2>/dev/null || :
    wait "$step_ticker" 2>/dev/null || :
    trap - INT TERM
    if [ "$step_rc" -ne 0 ]; then
        tail -n 25 "$step_log" >&2
        rm -f "$step_log"
        return "$step_rc"
    fi
    rm -f "$step_log"
    say "  done in $(($(date +%s) - step_start)) s"
}

may_apt() { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; }

apt_install() {
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    # Updates the package lists only if needed, as on a fresh machine.
    step "Installing $* (apt)" sh -c '
        apt-get install -y -q --no-install-recommends "$@" || { apt-get update -q && apt-get install -y -q --no-install-recommends "$@"; }
    ' sh "$@"
}

ensure_cc() {
    [ -z "${HIBERNODE_PYTHON:-}" ] || return 0
    for compiler in ${CC:-} cc gcc clang; do
        command -v "$compiler" >/dev/null 2>&1 && return 0
    done
    fix="install one (Debian, Ubuntu: apt-get install gcc libc6-dev), or set CC"
    may_apt || die "no C compiler (cc, gcc or clang), which builds the emulated driver." "$fix"
    apt_install gcc libc6-dev || die "the C compiler could not be installed." "$fix"
}

usable_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the path of a Python >= 3.11 that can create virtual environments.
find_python() {
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3; do
        if usable_python "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

ensure_python() {
    BASE_PYTHON=$(find_python) && return 0
    fix="install Python 3.11 or newer with venv (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv)"
    may_apt || die "no Python 3.11 or newer that can create virtual environments." "$fix"
    apt_install python3 python3-venv || die "Python could not be installed." "$fix"
    BASE_PYTHON=$(find_python) || die "this system's Python is older than 3.11." "$fix"
}

# Checksum of what an environment depends on: project file, path of the checkout, this file.
stamp_now() { { printf '%s\n' "$ROOT"; cat "$ROOT/pyproject.toml" "$ROOT/scripts/lib-venv.sh"; } | cksum; }

# ensure_venv EXTRA[,EXTRA]
ensure_venv() {
    if [ -n "${HIBERNODE_PYTHON:-}" ]; then
        PY=$HIBERNODE_PYTHON
        return 0
    fi
    stamp=$(stamp_now)
    venv_is_current "$1" && return 0
    # One set-up per checkout at a time; the lock ends with the subshell, and no child inherits it.
    (
        if command -v flock >/dev/null 2>&1; then
            flock -n 9 || { say "Waiting for another set-up of this checkout ..."; flock -w 300 9 || die "it did not end in 5 minutes." "stop it and try again"; }
        fi
        venv_is_current "$1" || make_venv "$1" 9<&-
    ) 9<"$ROOT/pyproject.toml" || exit 1
}

venv_is_current() {
    for extra in $(printf '%s' "$1" | tr ',' ' '); do
        [ "$(cat "$ROOT/.venv/.stamp-$extra" 2>/dev/null)" = "$stamp" ] || return 1
    done
    "$PY" -c 'pass' 2>/dev/null
}

make_venv() {
    if ! "$PY" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        ensure_python
        step "Creating .venv with $BASE_PYTHON" "$BASE_PYTHON" -m venv --clear "$ROOT/.venv" ||
            die ".venv could not be created." "remove $ROOT/.venv and try again"
    fi
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
    export PIP_DISABLE_PIP_VERSION_CHECK PIP_ROOT_USER_ACTION PIP_NO_INPUT
    # --no-compile: most modules are never imported; the others are compiled on first use.
    step "Installing hibernode with [$1] into .venv" \
        "$PY" -m pip install -q --no-compile --prefer-binary -e "$ROOT[$1]" ||
        die "the packages could not be installed." "see above; pip's own settings (index, proxy, cache) apply"
    for extra in $(printf '%s' "$1" | tr ',' ' '); do
        printf '%s\n' "$stamp" >"$ROOT/.venv/.stamp-$extra"
    done
}
