#!/usr/bin/env bash
# promtool, which checks and tests the rules: promtool.sh test rules infra/prometheus/rules-test.yaml
#
# It is this machine's, if there is one. Otherwise infra/local/debian.sh gets Debian's into the user's cache (20 MB,
# once): nothing is installed, no root. Exit 69 if it cannot be had.
#
# Environment, all optional: PROMTOOL_SUITE (a Debian release, by default the host's), and those of debian.sh.
set -euo pipefail

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/brickyard
PREFIX=$CACHE/promtool

fetch() {
    local suite folder
    # shellcheck disable=SC1091  # it is the host's
    suite=${PROMTOOL_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-}")}
    folder=$(mktemp -u "$PREFIX.XXXXXX")
    trap 'rm -rf "$folder"' RETURN
    "$(dirname "${BASH_SOURCE[0]}")/../local/debian.sh" alone "$suite" "$folder" prometheus || return 1
    "$folder/usr/bin/promtool" --version || return 1
    mv -T "$folder/usr/bin/promtool" "$PREFIX" # of several at once each finds a whole one
}

if tool=$(command -v promtool); then exec "$tool" "$@"; fi
mkdir -p "$CACHE"
if [ ! -x "$PREFIX" ] && ! fetch >"$PREFIX.log" 2>&1; then
    echo "promtool.sh: promtool cannot be fetched, see $PREFIX.log; apt-get install prometheus brings it" >&2
    exit 69
fi
exec "$PREFIX" "$@"
