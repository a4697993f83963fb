#!/usr/bin/env bash
# Debian packages, unpacked and not installed: debian.sh {alone|whole} SUITE FOLDER PACKAGE...
#
#   alone   the packages themselves
#   whole   with all that they depend on, down to the C library: their programs run on any Debian
#
# apt downloads them from this host's own mirror, as one that knows neither this host's packages nor its settings: no
# root is needed, and nothing of the host's changes. FOLDER must not exist; it is whole, or not there.
#
# Environment, all optional: DEBIAN_MIRROR, DEBIAN_KEYRING, DEBIAN_ARCH.
set -euo pipefail

[ $# -ge 4 ] || { echo "usage: debian.sh {alone|whole} SUITE FOLDER PACKAGE..." >&2; exit 2; }
HOW=$1 SUITE=$2 FOLDER=$(realpath -m "$3")
shift 3
case $HOW in
    alone) GET=(download) ;;
    whole) GET=(install --yes --download-only --no-install-recommends) ;;
    *) echo "debian.sh: $HOW is neither alone nor whole" >&2; exit 2 ;;
esac
[ ! -e "$FOLDER" ] || { echo "debian.sh: $FOLDER is there already" >&2; exit 1; }
# shellcheck disable=SC2016  # the $ is apt's
MIRROR=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/*$' || true)}
[ -n "$MIRROR" ] || { echo "debian.sh: apt knows no Debian mirror: give DEBIAN_MIRROR" >&2; exit 1; }

mkdir -p "$(dirname "$FOLDER")"
APT=$(mktemp -d "$FOLDER.XXXXXX")
trap 'rm -rf "$APT"' EXIT
mkdir -p "$APT"/etc/apt/{apt.conf.d,preferences.d,trusted.gpg.d} "$APT"/var/lib/dpkg "$APT"/unpacked \
    "$APT"/var/lib/apt/lists/partial "$APT"/var/cache/apt/archives/partial
: >"$APT/var/lib/dpkg/status"
KEYRING=${DEBIAN_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}
echo "deb [signed-by=$KEYRING] $MIRROR $SUITE main" >"$APT/etc/apt/sources.list"
OPTIONS=(-q -o "Dir=$APT" -o "Dir::State::status=$APT/var/lib/dpkg/status" -o Dir::Etc::sourceparts=-
    -o Acquire::Languages=none -o Acquire::Retries=3 -o "APT::Sandbox::User=$(id -un)"
    -o "APT::Architecture=${DEBIAN_ARCH:-$(dpkg --print-architecture)}")
cd "$APT/var/cache/apt/archives" # `download` puts them where it is called
apt-get "${OPTIONS[@]}" update
apt-get "${OPTIONS[@]}" "${GET[@]}" "$@"
for package in ./*.deb; do dpkg -x "$package" "$APT/unpacked"; done
# Renamed, so that of several at once each finds all of it or nothing.
chmod 755 "$APT/unpacked"
mv -T "$APT/unpacked" "$FOLDER"
