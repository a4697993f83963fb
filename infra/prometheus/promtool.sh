#!/usr/bin/env bash
# promtool, which checks and tests the rules: promtool.sh test rules infra/prometheus/rules-test.yaml
#
# It is this machine's, if there is one. Otherwise Debian's is downloaded by apt from this host's own mirror into the
# user's cache (20 MB, once) and unpacked there: nothing is installed, no root. Exit 69 if it cannot be had.
#
# Environment, all optional: PROMTOOL_SUITE (a Debian release, by default the host's), DEBIAN_MIRROR, DEBIAN_KEYRING.
set -euo pipefail

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/brickyard
PREFIX=$CACHE/promtool

fetch() {
    local suite apt keyring mirror options
    # shellcheck disable=SC1091  # it is the host's
    suite=${PROMTOOL_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-}")}
    keyring=${DEBIAN_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}
    # shellcheck disable=SC2016  # the $ is apt's
    mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/*$')}
    apt=$(mktemp -d "$PREFIX.XXXXXX")
    trap 'rm -rf "$apt"' RETURN
    mkdir -p "$apt"/etc/apt/{apt.conf.d,preferences.d,trusted.gpg.d} "$apt"/var/lib/dpkg "$apt"/unpacked \
        "$apt"/var/lib/apt/lists/partial "$apt"/var/cache/apt/archives/partial
    : >"$apt/var/lib/dpkg/status"
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$apt/etc/apt/sources.list"
    options=(-q -o "Dir=$apt" -o "Dir::State::status=$apt/var/lib/dpkg/status" -o Dir::Etc::sourceparts=-
        -o Acquire::Languages=none -o Acquire::Retries=3 -o "APT::Sandbox::User=$(id -un)")
    (cd "$apt" && apt-get "${options[@]}" update && apt-get "${options[@]}" download prometheus &&
        dpkg -x prometheus_*.deb unpacked && unpacked/usr/bin/promtool --version) >"$PREFIX.log" 2>&1 || return 1
    # Renamed, so that of several at once each finds all of it or nothing.
    mv -T "$apt/unpacked/usr/bin/promtool" "$PREFIX"
}

if tool=$(command -v promtool); then exec "$tool" "$@"; fi
mkdir -p "$CACHE"
if [ ! -x "$PREFIX" ] && ! fetch; then
    echo "promtool.sh: promtool cannot be fetched, see $PREFIX.log; apt-get install prometheus brings it" >&2
    exit 69
fi
exec "$PREFIX" "$@"
