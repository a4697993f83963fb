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
# STACK_DATA (a folder with nothing in it, at the first start); STACK_BIN (the folder of `ray` and `mlflow`); NODE_CPUS
# and NODE_STORE_BYTES (what a node says that it has: 3, whatever this machine has; 1 GiB for objects); and, of which
# those of the first start stay: STACK_NET (127.0.0), RAY_PORT (6379; and the next, and one more for each node),
# DASHBOARD_PORT (8265), MLFLOW_PORT (5000; and the next), S3_PORT (9000; and twelve more).
set -euo pipefail
shopt -s inherit_errexit

COMMAND=${1:-} DATA=$(realpath -m "${STACK_DATA:-${XDG_CACHE_HOME:-$HOME/.cache}/brickyard/stack}") OURS=ray-token
shift || true
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case " $COMMAND $* " in *" --help "* | *" -h "*) usage ;; esac

declare -A SETTINGS=([STACK_NET]=127.0.0 [RAY_PORT]=6379 [DASHBOARD_PORT]=8265 [MLFLOW_PORT]=5000 [S3_PORT]=9000)
for name in "${!SETTINGS[@]}"; do
    kept=$(cat "$DATA/settings/$name" 2>/dev/null || true)
    [ -z "$kept" ] || [ "${!name:-$kept}" = "$kept" ] \
        || fail "$name is ${!name}, and was $kept when $DATA was begun: leave it out, or give another STACK_DATA"
    SETTINGS[$name]=${kept:-${!name:-${SETTINGS[$name]}}}
done
NET=${SETTINGS[STACK_NET]} PORT=${SETTINGS[RAY_PORT]} DASHBOARD=${SETTINGS[DASHBOARD_PORT]}
S3=("$DATA/s3" "${SETTINGS[S3_PORT]}") MLFLOW=("$DATA/mlflow" "${SETTINGS[MLFLOW_PORT]}")

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
nodes() { # those that were started and not taken away, and those of which anything is left
    local file
    {
        for file in "$DATA"/node-*.pid; do [ ! -e "$file" ] || basename "$file" .pid; done
        names
    } | sed -n 's/^node-//p' | sort -nu
}
among() { local one; for one in "${@:2}"; do [ "$one" != "$1" ] || return 0; done; return 1; }
authorized() { # URL: by a file, since everybody on this machine can read a command line
    ask -m 3 -H @<(echo "Authorization: Bearer $(cat "$DATA/ray-token")") "$1"
}
# Once the agent of a node answers, jobs can be submitted there; Ray refuses them before, with "no available agent".
answers() {
    authorized "http://$(address "$1"):$(agent "$1")/api/local_raylet_healthz" \
        && { [ "$1" != 1 ] || authorized "http://127.0.0.1:$DASHBOARD/api/version"; }
}

begin() { # NODE
    local where=("--address=$(address 1):$PORT")
    if [ "$1" = 1 ]; then
        where=(--head "--port=$PORT" "--ray-client-server-port=$((PORT + 1))" "--temp-dir=$RUN"
            --include-dashboard=true --dashboard-host=127.0.0.1 "--dashboard-port=$DASHBOARD")
    fi
    # Workers listen on ports that the system deals out: those that Ray counts through are the same on each node.
    spawn "node-$1" env -u RAY_AUTH_TOKEN -u RAY_ADDRESS "XDG_CACHE_HOME=$DATA/cache" "MPLCONFIGDIR=$DATA/cache" \
        RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$DATA/ray-token" \
        "$BIN/ray" start --block --disable-usage-stats "${where[@]}" "--node-ip-address=$(address "$1")" \
        "--dashboard-agent-listen-port=$(agent "$1")" \
        --min-worker-port=0 --max-worker-port=0 "--num-cpus=${NODE_CPUS:-3}" \
        "--object-store-memory=${NODE_STORE_BYTES:-$((1 << 30))}"
}

take_away() { # NODE…: as clouds do: a signal to the first process, time to drain, and then what is left of it
    local node
    for node in "$@"; do if alive "node-$node"; then kill -TERM "$(pid_of "node-$node")" || true; fi; done
    for node in "$@"; do
        for _ in $(seq 400); do alive "node-$node" || break; sleep 0.1; done
        bury "node-$node"
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

up() {
    local name node said several=$1
    # Before anything is started. What we have there ourselves, or is left of it, is seen to further below.
    if [ -z "$(of node-1)" ]; then vacant RAY_PORT "$PORT" $((PORT + 1)); vacant DASHBOARD_PORT "$DASHBOARD"; fi
    for node in $(seq "$several"); do [ -n "$(of "node-$node")" ] || vacant RAY_PORT "$(agent "$node")"; done
    secret ray-token >/dev/null # the first thing there: it says whose it is
    settle "ray.$(id -u).$PORT"
    MORE_LOGS=$RUN/session_latest/logs
    mkdir -p "$LOG" "$DATA/settings"
    for name in "${!SETTINGS[@]}"; do # another may have begun while this one waited
        [ "$(cat "$DATA/settings/$name" 2>/dev/null || echo "${SETTINGS[$name]}")" = "${SETTINGS[$name]}" ] \
            || fail "$DATA was begun with another $name meanwhile: leave it out, or give another STACK_DATA"
    done
    for name in "${!SETTINGS[@]}"; do echo "${SETTINGS[$name]}" >"$DATA/settings/$name"; done
    unset "${OTHERS[@]}"
    said=$(storage up) # by itself, since an eval of what has failed is none
    eval "$said"
    said=$(tracker up)
    eval "$said"
    "$BIN/python" -c 'import fsspec; s3 = fsspec.filesystem("s3"); s3.exists("yard") or s3.mkdir("yard")'
    # shellcheck disable=SC2046  # several
    alive node-1 || take_away $(nodes) # nodes outlive their head by moments, and join no other
    for node in $(seq "$several"); do
        if ! alive "node-$node"; then take_away "$node"; begin "$node"; fi
        await "node-$node" answers "$node" # two that start at once may take the same name for their sockets
    done
}

down() {
    # shellcheck disable=SC2046  # several
    take_away $(nodes | grep -vx 1) $(nodes | grep -x 1)
    leave
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

begun() { [ -e "$DATA/settings" ] || fail "there is nothing in $DATA: infra/local/up"; }
wipe() {
    if [ -e "$DATA/settings" ]; then down; fi
    if [ -e "$DATA/mlflow/postgres.secret" ]; then tracker wipe; fi
    if [ -e "$DATA/s3/fsid" ]; then storage wipe; fi
    remove
}

case $COMMAND in
    up)
        [[ ${1:-3} =~ ^[1-9][0-9]*$ && ${1:-3} -le 250 ]] || fail "up $1: give how many nodes there shall be, 1 to 250"
        may_have lock
        find_programs
        "$HERE/s3.sh" check "${S3[@]}" # before anything is fetched, or begun
        tracker check
        alone up "${1:-3}"
        show
        ;;
    down)
        for node in "$@"; do
            # shellcheck disable=SC2046  # several
            among "$node" $(nodes) || fail "down $node: there is no such node, but $(nodes | tr '\n' ' ')"
            [ "$node" != 1 ] || fail "down 1: the head goes with all of it: infra/local/down"
        done
        if [ $# != 0 ]; then alone take_away "$@"; elif [ -e "$DATA/settings" ]; then alone down; fi
        ;;
    status) begun; status ;;
    env)
        begun
        find_programs
        show
        ;;
    wipe)
        ours || [ ! -e "$DATA" ] || fail "$DATA is not one of ours: it stays"
        alone wipe
        ;;
    *) usage ;;
esac
