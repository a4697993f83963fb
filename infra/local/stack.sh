#!/usr/bin/env bash
# A whole cluster on this machine, without Docker: stack.sh {up|down|status|env|wipe} [NODE…]
#
#   up [N]     start what is not running of: S3, PostgreSQL, MLflow, N nodes of Ray (3); and print its environment
#   down       stop all of it; what it holds stays in STACK_DATA
#   down K…    take away these nodes, as a cloud does: Ray is told first, and has 30 s; node 1 is the head
#   status     say what answers; exit 1 if any of it does not
#   env        print the environment of those who use it: eval "$(infra/local/stack.sh env)"
#   wipe       stop it and remove STACK_DATA
#
# Each node is a raylet of its own with an address of its own, 127.0.0.2 and on, as if it were a machine; node 1 has
# the dashboard, on 127.0.0.1. Whoever speaks to Ray, to MLflow or to S3 needs the secret of each, which is made up at
# the first start. The dashboard, MLflow, PostgreSQL and S3 listen on loopback only. Ray's own ports cannot be told to;
# they answer those who have the token, but for metrics, which are anyone's: no reason to open them to a network.
# The nodes have the environment of who starts them, so jobs find S3 and MLflow by it, and none of it is in a job's own.
#
# It needs `pip install -e '.[server]'` (`make up` does that) and what s3.sh and mlflow.sh say. Environment, all optional:
# STACK_DATA; STACK_BIN (the folder of `ray` and `mlflow`); NODE_CPUS and NODE_STORE_BYTES (what a node says that it has:
# 3, whatever this machine has; 1 GiB for objects); and, of which those of the first start stay: STACK_NET (127.0.0),
# RAY_PORT (6379; and the next, and one more for each node), DASHBOARD_PORT (8265), MLFLOW_PORT (5000; and the next),
# S3_PORT (9000; and twelve more).
set -euo pipefail
shopt -s inherit_errexit

HERE=$(cd "$(dirname "$0")" && pwd)
DATA=$(realpath -m "${STACK_DATA:-${XDG_CACHE_HOME:-$HOME/.cache}/brickyard/stack}")
COMMAND=${1:-}
shift || true

fail() { echo "stack.sh: $*" >&2; exit 1; }

declare -A SETTINGS=([STACK_NET]=127.0.0 [RAY_PORT]=6379 [DASHBOARD_PORT]=8265 [MLFLOW_PORT]=5000 [S3_PORT]=9000)
for name in "${!SETTINGS[@]}"; do
    kept=$(cat "$DATA/settings/$name" 2>/dev/null || true)
    [ -z "$kept" ] || [ "${!name:-$kept}" = "$kept" ] \
        || fail "$name is ${!name}, and was $kept when $DATA was begun: leave it out, or give another STACK_DATA"
    SETTINGS[$name]=${kept:-${!name:-${SETTINGS[$name]}}}
done
NET=${SETTINGS[STACK_NET]} PORT=${SETTINGS[RAY_PORT]} DASHBOARD=${SETTINGS[DASHBOARD_PORT]}
S3=("$DATA/s3" "${SETTINGS[S3_PORT]}") MLFLOW=("$DATA/mlflow" "${SETTINGS[MLFLOW_PORT]}")
# For sockets, whose names have at most 107 bytes; where it was at the first start, whatever TMPDIR says later.
RUN=$(cat "$DATA/run" 2>/dev/null || echo "${TMPDIR:-/tmp}/brickyard-ray.$(id -u).$PORT")

secret() { # NAME: it, made up at the first time
    [ -s "$DATA/$1" ] || (umask 077; head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1 >"$DATA/$1")
    cat "$DATA/$1"
}

find_programs() {
    local ray
    BIN=$(realpath -m "${STACK_BIN:-$HERE/../../.venv/bin}")
    if [ ! -x "$BIN/ray" ]; then
        [ -z "${STACK_BIN:-}" ] || fail "STACK_BIN is $STACK_BIN, and there is no ray"
        ray=$(command -v ray) || fail "there is no ray: make up, or give STACK_BIN"
        BIN=$(dirname "$ray")
    fi
    export PATH="$BIN:$PATH" MLFLOW_BIN=$BIN/mlflow
}

storage() {
    local S3_SECRET_KEY
    S3_SECRET_KEY=$(secret s3-secret)
    export S3_SECRET_KEY
    "$HERE/s3.sh" "$1" "${S3[@]}"
}
tracker() { "$HERE/mlflow.sh" "$1" "${MLFLOW[@]}"; }

# --- Ray --------------------------------------------------------------------------------------------------------------

address() { echo "$NET.$(($1 + 1))"; }
agent() { echo $((PORT + 1 + $1)); } # it listens on 127.0.0.1 too, so each node has another port
mark() { echo "BRICKYARD_STACK=$DATA:$1"; } # all that a node starts inherits it: by it, and nothing else, it is known
of_node() { # processes may end, or be others', while they are looked at
    { grep -lszxF -- "$(mark "$1")" /proc/[0-9]*/environ 2>/dev/null || true; } | cut -d / -f 3
}
nodes() { # those that were started and not taken away, and those of which anything is left
    local file line
    {
        for file in "$DATA"/node-*.pid; do [ ! -e "$file" ] || basename "$file" .pid | cut -d - -f 2; done
        { grep -hszF -- "$(mark "")" /proc/[0-9]*/environ 2>/dev/null || true; } | tr '\0' '\n' \
            | while read -r line; do [[ $line != "$(mark "")"* ]] || echo "${line##*:}"; done
    } | sort -nu
}
among() { local one; for one in "${@:2}"; do [ "$one" != "$1" ] || return 0; done; return 1; }
# shellcheck disable=SC2046  # several
alive() { [ -e "$DATA/node-$1.pid" ] && among "$(cat "$DATA/node-$1.pid")" $(of_node "$1"); }
authorized() { # URL: by a file, since everybody on this machine can read a command line
    curl -fs -o /dev/null -m 3 -H @<(echo "Authorization: Bearer $(cat "$DATA/ray-token")") "$1"
}
# Once the agent of a node answers, jobs can be submitted there; Ray refuses them before, with "no available agent".
answers() {
    authorized "http://$(address "$1"):$(agent "$1")/api/local_raylet_healthz" \
        && { [ "$1" != 1 ] || authorized "http://127.0.0.1:$DASHBOARD/api/version"; }
}

begin() { # NODE: as a process group of its own; 9 is the lock, which must not outlive us
    local where=("--address=$(address 1):$PORT")
    if [ "$1" = 1 ]; then
        where=(--head "--port=$PORT" "--ray-client-server-port=$((PORT + 1))" "--temp-dir=$RUN"
            --include-dashboard=true --dashboard-host=127.0.0.1 "--dashboard-port=$DASHBOARD")
    fi
    # Workers listen on ports that the system deals out: those that Ray counts through are the same on each node.
    env -u RAY_AUTH_TOKEN -u RAY_ADDRESS "$(mark "$1")" "XDG_CACHE_HOME=$DATA/cache" "MPLCONFIGDIR=$DATA/cache" \
        RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$DATA/ray-token" \
        setsid "$BIN/ray" start --block --disable-usage-stats "${where[@]}" "--node-ip-address=$(address "$1")" \
        "--dashboard-agent-listen-port=$(agent "$1")" \
        --min-worker-port=0 --max-worker-port=0 "--num-cpus=${NODE_CPUS:-3}" \
        "--object-store-memory=${NODE_STORE_BYTES:-$((1 << 30))}" >>"$DATA/log/node-$1.out" 2>&1 </dev/null 9>&- &
    echo $! >"$DATA/node-$1.pid"
}

await() { # NODE: until it answers, while it lives
    for _ in $(seq 240); do
        if answers "$1"; then return 0; fi
        kill -0 "$(cat "$DATA/node-$1.pid")" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 15 "$DATA/log/node-$1.out" >&2
    fail "node $1 did not come up; see $DATA/log and $RUN/session_latest/logs"
}

end() { # NODE…: as clouds take machines away: a signal, time to drain, and then what is left of it
    local node pids
    for node in "$@"; do if alive "$node"; then kill -TERM "$(cat "$DATA/node-$node.pid")" || true; fi; done
    for node in "$@"; do
        for _ in $(seq 80); do alive "$node" || break; sleep 0.5; done
        while pids=$(of_node "$node") && [ -n "$pids" ]; do
            # shellcheck disable=SC2086  # several
            kill -KILL $pids 2>/dev/null || true
            sleep 0.1
        done
        rm -f "$DATA/node-$node.pid"
    done
}

# ----------------------------------------------------------------------------------------------------------------------

show() {
    storage env
    tracker env
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=http://127.0.0.1:%s\n' "$DATA/ray-token" "$DASHBOARD"
    echo "unset ${OTHERS[*]}"
    # shellcheck disable=SC2016  # that PATH is theirs
    printf 'case :$PATH: in *:%q:*) ;; *) export PATH=%q:$PATH ;; esac\n' "$BIN" "$BIN"
}
OTHERS=(AWS_SESSION_TOKEN AWS_PROFILE AWS_ENDPOINT_URL_S3 MLFLOW_TRACKING_TOKEN RAY_AUTH_TOKEN RAY_ADDRESS) # would be heard first

vacant() { # NAME PORT…: nobody may listen there, since it would be taken for ours
    local port name=$1; shift
    for port in "$@"; do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            fail "port $port is another's: end that, or give another $name"
        fi
    done
}

runs() { kill -0 "$(cat "$1" 2>/dev/null)" 2>/dev/null; } # FILE: with the number of a process

up() {
    local node name said several=$1
    mkdir -p "$DATA/log"
    secret ray-token >/dev/null # it also says that the folder is ours
    # Before anything is started. What we have there ourselves, or is left of it, is seen to further below.
    runs "$DATA/s3/rgw.pid" || vacant S3_PORT "${S3[1]}"
    # shellcheck disable=SC2046  # several
    runs "$DATA/s3/mon.pid" || runs "$DATA/s3/osd.pid" || vacant S3_PORT $(seq $((S3[1] + 1)) $((S3[1] + 12)))
    runs "$DATA/mlflow/server.pid" || vacant MLFLOW_PORT "${MLFLOW[1]}"
    runs "$DATA/mlflow/postgres.pid" || vacant MLFLOW_PORT $((MLFLOW[1] + 1))
    if [ -z "$(of_node 1)" ]; then vacant RAY_PORT "$PORT" $((PORT + 1)); vacant DASHBOARD_PORT "$DASHBOARD"; fi
    for node in $(seq "$several"); do [ -n "$(of_node "$node")" ] || vacant RAY_PORT "$(agent "$node")"; done
    (umask 077; mkdir -p "$RUN")
    [ -O "$RUN" ] && [ ! -L "$RUN" ] || fail "$RUN is another's: give another TMPDIR"
    echo "$RUN" >"$DATA/run"
    mkdir -p "$DATA/settings"
    for name in "${!SETTINGS[@]}"; do echo "${SETTINGS[$name]}" >"$DATA/settings/$name"; done
    unset "${OTHERS[@]}"
    said=$(storage up) # by itself, since an eval of what has failed is none
    eval "$said"
    said=$(tracker up)
    eval "$said"
    "$BIN/python" -c 'import fsspec; s3 = fsspec.filesystem("s3"); s3.exists("yard") or s3.mkdir("yard")'
    # shellcheck disable=SC2046  # several
    alive 1 || end $(nodes) # nodes outlive their head by moments, and join no other
    for node in $(seq "$several"); do
        if ! alive "$node"; then end "$node"; begin "$node"; fi
        await "$node" # two that start at once may take the same name for their sockets
    done
}

down() {
    # shellcheck disable=SC2046  # several
    end $(nodes | grep -vx 1) $(nodes | grep -x 1)
    rm -rf "$RUN"
    if [ -d "$DATA/mlflow" ]; then tracker stop; fi
    if [ -d "$DATA/s3" ]; then storage stop; fi
}

status() {
    local node down=0
    for node in s3 mlflow $(nodes); do
        if case $node in
            s3) storage status >/dev/null 2>&1 ;;
            mlflow) tracker status >/dev/null 2>&1 ;;
            *) answers "$node" ;;
        esac then echo "$node healthy"; else echo "$node down"; down=1; fi
    done
    return $down
}

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }

case " $COMMAND $* " in *" --help "* | *" -h "*) usage ;; esac
begun() { [ -e "$DATA/settings" ] || fail "there is nothing in $DATA: infra/local/up"; }
alone() { # COMMAND…: while no other works on the same folder
    (flock -w 900 9 || fail "another works on $DATA since 15 minutes"; "$@") 9>"$DATA/lock"
}
wipe() {
    if [ -e "$DATA/settings" ]; then down; fi
    if [ -e "$DATA/mlflow/postgres.secret" ]; then tracker wipe; fi
    if [ -e "$DATA/s3/fsid" ]; then storage wipe; fi
    rm -rf "$DATA"
}

case $COMMAND in
    up)
        [[ ${1:-3} =~ ^[1-9][0-9]*$ && ${1:-3} -le 250 ]] || fail "up $1: give how many nodes there shall be, 1 to 250"
        find_programs
        tracker check # before anything is fetched
        mkdir -p "$DATA"
        alone up "${1:-3}"
        show
        ;;
    down)
        for node in "$@"; do
            # shellcheck disable=SC2046  # several
            among "$node" $(nodes) || fail "down $node: there is no such node, but $(nodes | tr '\n' ' ')"
            [ "$node" != 1 ] || fail "down 1: the head goes with all of it: infra/local/down"
        done
        if [ $# != 0 ]; then alone end "$@"; elif [ -e "$DATA/settings" ]; then alone down; fi
        ;;
    status) begun; status ;;
    env)
        begun
        find_programs
        show
        ;;
    wipe)
        [ ! -e "$DATA" ] || [ -e "$DATA/ray-token" ] || fail "$DATA is not one of ours: it stays"
        [ ! -e "$DATA" ] || alone wipe
        ;;
    *) usage ;;
esac
