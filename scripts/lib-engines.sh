# Sourced after lib-venv.sh: installs what `scripts/test --all` needs besides Python and a C compiler.
#
#   . "$ROOT/scripts/lib-engines.sh"
#   ensure_engines            # installs missing packages if allowed; otherwise prints them, and their tests skip

# PROGRAM:PACKAGE of Debian and Ubuntu. Podman keeps its network programs in a folder of its own.
ENGINE_PROGRAMS="dockerd:docker.io podman:podman conmon:conmon runc:runc
    /usr/lib/podman/netavark:netavark /usr/lib/podman/aardvark-dns:aardvark-dns
    iptables:iptables ip:iproute2 busybox:busybox-static mmdebstrap:mmdebstrap systemd-nspawn:systemd-container"

missing_packages() {
    for pair in $ENGINE_PROGRAMS; do
        program=${pair%%:*}
        command -v "$program" >/dev/null 2>&1 || printf '%s\n' "${pair##*:}"
    done
    # Debian keeps PostgreSQL's programs out of PATH, by version.
    for program in /usr/lib/postgresql/*/bin/initdb initdb; do
        ! command -v "$program" >/dev/null 2>&1 || return 0
    done
    printf 'postgresql\n'
}

ensure_engines() {
    packages=$(missing_packages | tr '\n' ' ')
    [ -n "$packages" ] || return 0
    if ! may_apt; then
        say "Missing: $packages(not root, or no apt-get: nothing is installed; the tests that need them skip)."
        return 0
    fi
    # shellcheck disable=SC2086
    without_starting_services apt_install $packages ||
        say "They could not be installed; the tests that need them skip."
}

# The tests start their own engines; installing must not start one for the whole host.
without_starting_services() {
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
    "$@" && policy_rc=0 || policy_rc=$?
    rm -f "$policy"
    trap - EXIT
    return "$policy_rc"
}
