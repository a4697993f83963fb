#!/usr/bin/env bash
# A real S3 server on loopback, for tests and for trying things: s3.sh {up|stop|status|env|wipe} [DATA] [PORT]
#
#   up      start it, at the first call after fetching it (156 MB; half a minute), and print its environment
#   stop    stop it; what it holds stays in DATA
#   status  say whether it answers a signed request; exit 1 if not
#   env     print the environment that S3 clients need: eval "$(infra/local/s3.sh env)"
#   wipe    stop it and remove DATA
#
# It is Ceph's RADOS gateway with one monitor and one disk, a sparse file. debian.sh unpacks Debian's packages in the
# user's cache: nothing is installed, no root, no systemd. The programs run with the libraries they came with, so any
# Debian on x86_64 can be the host. It listens on 127.0.0.1 only:
# PORT speaks S3, PORT+1 to PORT+12 are its own. After kill -9 of any of it, `up` starts what is missing.
#
# Environment, all optional: S3_ACCESS_KEY, S3_SECRET_KEY, S3_DISK_BYTES (fixed at the first start), CEPH_SUITE (Debian
# releases, the first that can be had wins), and those of debian.sh.
set -euo pipefail

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/brickyard
COMMAND=${1:-} DATA=$(realpath -m "${2:-$CACHE/s3}") PORT=${3:-9000}
PREFIX=$CACHE/ceph LIB=$CACHE/ceph/usr/lib/x86_64-linux-gnu
CONF=$DATA/ceph.conf LOG=$DATA/log
# For sockets, whose names have at most 107 bytes; where it was at the first start, whatever TMPDIR says later.
RUN=$(cat "$DATA/run" 2>/dev/null || echo "${TMPDIR:-/tmp}/brickyard-s3.$(id -u).$PORT")
ACCESS_KEY=${S3_ACCESS_KEY:-brickyard} SECRET_KEY=${S3_SECRET_KEY:-brickyard-secret} REGION=us-east-1
export CEPH_ARGS="" CEPH_CONF=$CONF PYTHONDONTWRITEBYTECODE=1
unset LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH PYTHONHOME

fail() { echo "s3.sh: $*" >&2; exit 1; }

# --- the programs -----------------------------------------------------------------------------------------------------

run() { # PROGRAM ARGUMENTS: by the loader and the libraries of its own release
    local program=$1; shift
    "$LIB/ld-linux-x86-64.so.2" --library-path "$LIB:$LIB/ceph" "$PREFIX/usr/bin/$program" "$@"
}
ceph() { PYTHONHOME=$PREFIX/usr run python3 "$PREFIX/usr/bin/ceph" --conf "$CONF" "$@"; }

unpack() { # SUITE: its packages into the prefix
    rm -rf "$PREFIX"
    DEBIAN_ARCH=amd64 "$(dirname "${BASH_SOURCE[0]}")/debian.sh" whole "$1" "$PREFIX" radosgw ceph-mon ceph-osd \
        ceph-common || return 1
    rm -rf "${PREFIX:?}"/{etc,var} "${PREFIX:?}"/usr/{share,libexec,sbin,include,games} "$PREFIX/usr/lib/systemd"
    run radosgw --version >"$PREFIX/version" || return 1
    PYTHONHOME=$PREFIX/usr run python3 -c 'import rados, ceph_argparse' || return 1
    touch "$PREFIX/complete"
}

fetch() {
    local suite
    [ ! -e "$PREFIX/complete" ] || return 0
    for suite in ${CEPH_SUITE:-forky trixie}; do
        echo "s3.sh: fetching Ceph from Debian $suite, once" >&2
        if unpack "$suite" >"$CACHE/ceph.log" 2>&1; then return 0; fi
    done
    tail -n 5 "$CACHE/ceph.log" >&2
    fail "Ceph cannot be fetched; all of it is in $CACHE/ceph.log"
}

# --- the cluster ------------------------------------------------------------------------------------------------------

configure() {
    (umask 077; mkdir -p "$RUN")
    [ -O "$RUN" ] && [ ! -L "$RUN" ] || fail "$RUN is another's: give another TMPDIR"
    mkdir -p "$LOG" "$DATA"/{crash,rgw}
    echo "$RUN" >"$DATA/run"
    [ -s "$DATA/fsid" ] || cat /proc/sys/kernel/random/uuid >"$DATA/fsid"
    cat >"$CONF" <<END
[global]
fsid = $(cat "$DATA/fsid")
mon_initial_members = a
mon_host = v2:127.0.0.1:$((PORT + 1))/0
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
ms_bind_port_min = $((PORT + 2))
ms_bind_port_max = $((PORT + 12))
# No keys between the parts; the gateway then insists on encryption unless each mode says otherwise.
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_cluster_mode = crc
ms_service_mode = crc
ms_client_mode = crc
run_dir = $RUN
admin_socket = $RUN/\$name.asok
log_file = $LOG/\$name.log
crash_dir = $DATA/crash
plugin_dir = $LIB/ceph
erasure_code_dir = $LIB/ceph/erasure-code
osd_class_dir = $LIB/rados-classes
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
$(printf 'debug_%s = 0/0\n' ms mon paxos osd bluestore bluefs bdev rocksdb rgw rgw_access)
[mon]
mon_data = $DATA/mon
# A new pool takes several rounds of voting, of 1 s each by default.
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[osd]
osd_data = $DATA/osd
osd_objectstore = bluestore
bluestore_block_size = ${S3_DISK_BYTES:-$((32 << 30))}
# The default scheduler allows some 300 operations a second where the disk calls itself rotational.
osd_op_queue = wpq
bluestore_debug_enforce_settings = ssd
osd_memory_target = 1073741824
osd_client_watch_timeout = 5
[client]
rgw_rados_pool_pg_num_min = 4
rgw_relaxed_region_enforcement = true
[client.rgw.a]
rgw_data = $DATA/rgw
# Without tcp_nodelay a small answer waits 40 ms: Nagle's algorithm meets delayed acknowledgements.
rgw_frontends = beast endpoint=127.0.0.1:$PORT tcp_nodelay=1
rgw_enable_apis = s3
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
# After kill -9, new buckets wait until the watch of the dead gateway has expired.
objecter_tick_interval = 1
# The space of large objects that were deleted comes back in minutes, not hours.
rgw_gc_obj_min_wait = 300
rgw_gc_processor_period = 60
rgw_gc_processor_max_time = 60
END
}

pid_of() { cat "$DATA/$1.pid" 2>/dev/null; }

alive() { # NAME: a process of ours, neither a zombie nor another that got its number
    local pid; pid=$(pid_of "$1") && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "--conf $CONF "
}

spawn() { # NAME PROGRAM ARGUMENTS; 9 is the lock, which must not outlive us
    local name=$1 program=$2; shift 2
    alive "$name" && return 0
    setsid "$LIB/ld-linux-x86-64.so.2" --library-path "$LIB:$LIB/ceph" "$PREFIX/usr/bin/$program" \
        --conf "$CONF" -f "$@" >>"$LOG/$name.out" 2>&1 </dev/null 9>&- &
    echo $! >"$DATA/$name.pid"
}

disk_is_up() { ceph --admin-daemon "$RUN/osd.0.asok" status 2>/dev/null | grep -q '"state": "active"'; }
listens() { curl -s -o /dev/null -m 2 "http://127.0.0.1:$PORT/"; }
healthy() { # the answer to a signed request, by a gateway that is ours and knows our user
    alive rgw && curl -fs -o /dev/null -m 3 --aws-sigv4 "aws:amz:$REGION:s3" -u "$ACCESS_KEY:$SECRET_KEY" \
        -H "x-amz-content-sha256: $(printf '' | sha256sum | cut -d ' ' -f 1)" "http://127.0.0.1:$PORT/"
}

await() { # CONDITION NAME: until it holds, while the process lives
    for _ in $(seq 200); do
        if "$1"; then return 0; fi
        alive "$2" || break
        sleep 0.2
    done
    tail -n 15 "$LOG/$2.out" >&2
    fail "$2 did not come up; see $LOG"
}

once() { # NAME COMMAND: run it unless it once succeeded here
    local done=$DATA/$1.done; shift
    [ ! -e "$done" ] || return 0
    "$@" >>"$LOG/setup.out" 2>&1 || { tail -n 15 "$LOG/setup.out" >&2; fail "$1 failed; see $LOG/setup.out"; }
    touch "$done"
}

make_monitor() {
    rm -rf "$DATA"/mon "$DATA/monmap" && mkdir "$DATA/mon" || return 1
    run monmaptool --create --addv a "[v2:127.0.0.1:$((PORT + 1))]" --fsid "$(cat "$DATA/fsid")" "$DATA/monmap" \
        && run ceph-mon --conf "$CONF" --mkfs -i a --monmap "$DATA/monmap"
}
make_disk() {
    local id; id=$(cat /proc/sys/kernel/random/uuid)
    rm -rf "$DATA/osd" && mkdir "$DATA/osd" || return 1
    ceph --connect-timeout 20 osd new "$id" 0 && run ceph-osd --conf "$CONF" -i 0 --mkfs --osd-uuid "$id"
}
make_user() {
    run radosgw-admin --conf "$CONF" -n client.rgw.a user create --uid=brickyard --display-name=brickyard \
        --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" --max-buckets=0
}

up() {
    alive rgw || ! listens || fail "port $PORT is another's, whose answers would be taken for ours: give another"
    configure
    cmp -s "$PREFIX/version" "$DATA/version" || [ ! -e "$DATA/version" ] \
        || fail "$DATA was made by another version of Ceph: wipe it, or give another folder"
    cp "$PREFIX/version" "$DATA/version"
    once monitor make_monitor
    spawn mon ceph-mon -i a
    once disk make_disk
    spawn osd ceph-osd -i 0
    await disk_is_up osd
    spawn rgw radosgw -n client.rgw.a
    await listens rgw
    once user make_user
    await healthy rgw
}

stop() {
    local name pid
    for name in rgw osd mon; do
        if alive "$name"; then
            pid=$(pid_of "$name")
            # The gateway keeps nothing, and would take half a minute to go.
            if [ "$name" = rgw ]; then kill -KILL "$pid"; else kill -TERM "$pid"; fi
            for _ in $(seq 100); do alive "$name" || break; sleep 0.1; done
            if alive "$name"; then kill -KILL "$pid"; fi
        fi
        rm -f "$DATA/$name.pid"
    done
}

show() {
    echo "export AWS_ENDPOINT_URL=http://127.0.0.1:$PORT AWS_REGION=$REGION AWS_DEFAULT_REGION=$REGION"
    printf 'export AWS_ACCESS_KEY_ID=%q AWS_SECRET_ACCESS_KEY=%q\n' "$ACCESS_KEY" "$SECRET_KEY"
}

alone() { # COMMAND…: while no other works on the same folder
    (flock 9; "$@") 9>"$DATA/lock"
}
wipe() {
    stop
    rm -rf "$DATA" "$RUN"
}

case $COMMAND in
    up)
        for tool in apt-get dpkg curl flock setsid; do
            command -v "$tool" >/dev/null || fail "$tool is needed"
        done
        ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
        mkdir -p "$CACHE" "$DATA"
        (flock 9; fetch) 9>"$CACHE/ceph.lock"
        alone up
        show
        ;;
    stop) [ ! -e "$DATA/fsid" ] || alone stop ;;
    status) if healthy; then echo healthy; else echo down; exit 1; fi ;;
    env) show ;;
    wipe)
        [ ! -e "$DATA" ] || [ -e "$DATA/fsid" ] || fail "$DATA is not one of ours: it stays"
        [ ! -e "$DATA" ] || alone wipe
        ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
