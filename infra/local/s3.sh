#!/usr/bin/env bash
# A real S3 server on loopback, for tests and for trying things: s3.sh {check|up|stop|status|env|wipe} [DATA] [PORT]
#
#   check   say if a program is missing that `up` needs, or a port is another's; exit 1 then
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
COMMAND=${1:-} DATA=$(realpath -m "${2:-$CACHE/s3}") PORT=${3:-9000} OURS=fsid
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PREFIX=$CACHE/ceph LIB=$CACHE/ceph/usr/lib/x86_64-linux-gnu
CONF=$DATA/ceph.conf
ACCESS_KEY=${S3_ACCESS_KEY:-brickyard} SECRET_KEY=${S3_SECRET_KEY:-brickyard-secret} REGION=us-east-1
export CEPH_ARGS="" CEPH_CONF=$CONF PYTHONDONTWRITEBYTECODE=1
unset LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH PYTHONHOME

# --- the programs -----------------------------------------------------------------------------------------------------

run() { # PROGRAM ARGUMENTS: by the loader and the libraries of its own release
    local program=$1; shift
    "$LIB/ld-linux-x86-64.so.2" --library-path "$LIB:$LIB/ceph" "$PREFIX/usr/bin/$program" "$@"
}
ceph() { PYTHONHOME=$PREFIX/usr run python3 "$PREFIX/usr/bin/ceph" --conf "$CONF" "$@"; }

unpack() { # SUITE: its packages into the prefix
    rm -rf "$PREFIX"
    DEBIAN_ARCH=amd64 "$HERE/debian.sh" whole "$1" "$PREFIX" radosgw ceph-mon ceph-osd \
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
    [ -s "$DATA/fsid" ] || cat /proc/sys/kernel/random/uuid >"$DATA/fsid" # the first thing there: it says whose it is
    settle "s3.$(id -u).$PORT"
    mkdir -p "$LOG" "$DATA"/{crash,rgw}
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

serve() { # NAME PROGRAM ARGUMENTS: unless it does
    alive "$1" || spawn "$1" "$LIB/ld-linux-x86-64.so.2" --library-path "$LIB:$LIB/ceph" "$PREFIX/usr/bin/$2" \
        --conf "$CONF" -f "${@:3}"
}

disk_is_up() { ceph --admin-daemon "$RUN/osd.0.asok" status 2>/dev/null | grep -q '"state": "active"'; }
healthy() { # the answer to a signed request, by a gateway that is ours and knows our user
    alive rgw && ask -m 3 --aws-sigv4 "aws:amz:$REGION:s3" -u "$ACCESS_KEY:$SECRET_KEY" \
        -H "x-amz-content-sha256: $(printf '' | sha256sum | cut -d ' ' -f 1)" "http://127.0.0.1:$PORT/"
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
    ceph --connect-timeout 120 osd new "$id" 0 && run ceph-osd --conf "$CONF" -i 0 --mkfs --osd-uuid "$id"
}
make_user() {
    run radosgw-admin --conf "$CONF" -n client.rgw.a user create --uid=brickyard --display-name=brickyard \
        --access-key="$ACCESS_KEY" --secret-key="$SECRET_KEY" --max-buckets=0
}

find_room() { # for what is not there of ours
    local setting="PORT (S3_PORT of stack.sh)"
    [ -n "$(of rgw)" ] || vacant "$setting" "$PORT"
    [ -n "$(of mon)" ] || vacant "$setting" $((PORT + 1))
    # shellcheck disable=SC2046  # several
    [ -n "$(of osd)" ] || vacant "$setting" $(seq $((PORT + 2)) $((PORT + 12)))
}

up() {
    local name
    for name in rgw osd mon; do alive "$name" || bury "$name"; done
    find_room
    configure
    cmp -s "$PREFIX/version" "$DATA/version" || [ ! -e "$DATA/version" ] \
        || fail "$DATA was made by another version of Ceph: wipe it, or give another folder"
    cp "$PREFIX/version" "$DATA/version"
    once monitor make_monitor
    serve mon ceph-mon -i a
    once disk make_disk
    serve osd ceph-osd -i 0
    await osd disk_is_up
    serve rgw radosgw -n client.rgw.a
    await rgw listens "$PORT"
    once user make_user
    await rgw healthy
}

stop() {
    end rgw KILL # it keeps nothing, and would take half a minute to go
    end osd TERM
    end mon TERM
    leave
}

show() {
    show_no_proxy
    echo "export AWS_ENDPOINT_URL=http://127.0.0.1:$PORT AWS_REGION=$REGION AWS_DEFAULT_REGION=$REGION"
    printf 'export AWS_ACCESS_KEY_ID=%q AWS_SECRET_ACCESS_KEY=%q\n' "$ACCESS_KEY" "$SECRET_KEY"
}

wipe() {
    stop
    remove
}
need_tools() { need apt-get dpkg curl flock setsid; }

case $COMMAND in
    check)
        need_tools
        find_room
        ;;
    up)
        need_tools
        may_have lock
        ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
        mkdir -p "$CACHE"
        (flock 9; fetch) 9>"$CACHE/ceph.lock"
        alone up
        show
        ;;
    stop) ! ours || alone stop ;;
    status) if healthy; then echo healthy; else echo down; exit 1; fi ;;
    env) show ;;
    wipe)
        ours || [ ! -e "$DATA" ] || fail "$DATA is not one of ours: it stays"
        alone wipe
        ;;
    *) usage ;;
esac
