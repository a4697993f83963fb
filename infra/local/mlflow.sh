#!/usr/bin/env bash
# A real MLflow server on loopback, for tests and for trying things: mlflow.sh {check|up|stop|status|env|wipe} [DATA] [PORT]
#
#   check   say if a program is missing that `up` needs; exit 1 then
#   up      start it, and PostgreSQL behind it, and print its environment
#   stop    stop both; what they hold stays in DATA and on S3
#   status  say whether it answers one who has the password; exit 1 if not
#   env     print the environment that MLflow's clients need: eval "$(infra/local/mlflow.sh env)"
#   wipe    stop both and remove DATA; the artifacts stay in their bucket
#
# Runs, metrics, models and users lie in PostgreSQL, artifacts on S3, through the server: its clients need no key to
# the bucket. It asks for a password, and answers only to the names of this host. The S3 server is whichever
# AWS_ENDPOINT_URL and its kin name: eval "$(infra/local/s3.sh up)" before. PORT speaks MLflow, PORT+1 PostgreSQL, both
# on 127.0.0.1 only. For other machines put a proxy with TLS before it, and give its name in MLFLOW_HOSTS.
#
# It needs `pip install -e '.[server]'` and Debian's postgresql (or another with initdb on the PATH). Environment, all
# optional: MLFLOW_USER, MLFLOW_PASSWORD (of the administrator, 12 characters at least; that of the first start
# stays, or one that is made up then), MLFLOW_HOSTS (further names, with commas between them), MLFLOW_ARTIFACTS
# (s3://mlflow), MLFLOW_BIN, POSTGRES_BIN.
set -euo pipefail

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/brickyard
COMMAND=${1:-} DATA=$(realpath -m "${2:-$CACHE/mlflow}") PORT=${3:-5000}
HOME_OF_CODE=$(cd "$(dirname "$0")/../.." && pwd)
ARTIFACTS=${MLFLOW_ARTIFACTS:-s3://mlflow} ADMIN=${MLFLOW_USER:-brickyard} PASSWORD=$(cat "$DATA/password" 2>/dev/null || echo "${MLFLOW_PASSWORD:-}")
LOG=$DATA/log
STORE=postgresql+psycopg://mlflow@127.0.0.1:$((PORT + 1))

export PGPASSFILE=$DATA/pgpass # for PostgreSQL, of which nobody needs to know the password

fail() { echo "mlflow.sh: $*" >&2; exit 1; }

find_programs() {
    local candidate tool
    for tool in curl flock setsid unshare; do
        command -v "$tool" >/dev/null || fail "$tool is needed"
    done
    MLFLOW=${MLFLOW_BIN:-$HOME_OF_CODE/.venv/bin/mlflow}
    [ -x "$MLFLOW" ] || MLFLOW=$(command -v mlflow) || fail "there is no mlflow: pip install -e '.[server]', or give MLFLOW_BIN"
    POSTGRES=${POSTGRES_BIN:-}
    # The version that has made the data, else the newest.
    for candidate in /usr/lib/postgresql/"$(cat "$DATA/postgres/PG_VERSION" 2>/dev/null)"/bin \
        $(printf '%s\n' /usr/lib/postgresql/*/bin | sort -Vr) "$(dirname "$(command -v initdb || true)")"; do
        [ -n "$POSTGRES" ] || { [ -x "$candidate/initdb" ] && POSTGRES=$candidate; }
    done
    [ -n "$POSTGRES" ] || fail "there is no PostgreSQL: apt-get install postgresql, or give POSTGRES_BIN, the folder of initdb"
}

as_nobody() { # PostgreSQL does not run as root; what root calls itself in a namespace of its own is enough for it
    if [ "$(id -u)" = 0 ]; then unshare --user --map-user=1000 --map-group=1000 "$@"; else "$@"; fi
}

secret() { head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1; }

pid_of() { cat "$DATA/$1.pid" 2>/dev/null; }
alive() { # NAME: a process of ours, neither a zombie nor another that got its number
    local pid; pid=$(pid_of "$1") && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "$2"
}
postgres_alive() { alive postgres "$DATA/postgres"; }
server_alive() { alive server "--port $PORT "; }

spawn() { # NAME COMMAND…; 9 is the lock, which must not outlive us
    local name=$1; shift
    setsid "$@" >>"$LOG/$name.out" 2>&1 </dev/null 9>&- &
    echo $! >"$DATA/$name.pid"
}

await() { # CONDITION NAME: until it holds, while the process lives
    for _ in $(seq 600); do
        if "$1"; then return 0; fi
        "$2_alive" || break
        sleep 0.1
    done
    tail -n 15 "$LOG/$2.out" >&2
    fail "$2 did not come up; see $LOG"
}
vacant() { # PORT: nobody may listen there but whom we start, or their answers would be taken for ours
    if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then fail "port $1 is another's: end that, or give another PORT"; fi
}
takes_queries() { "$POSTGRES/pg_isready" -q -h 127.0.0.1 -p $((PORT + 1)) -U mlflow -d postgres; }
answers() { # one of ours: any other would be told our password
    server_alive || return 1
    # By its standard input: what stands on a command line everybody on this machine can read.
    # shellcheck disable=SC2001  # of two characters
    printf 'user = "%s"\n' "$(sed 's/[\\"]/\\&/g' <<<"$ADMIN:$PASSWORD")" \
        | curl -fs -o /dev/null -m 10 -K - "http://127.0.0.1:$PORT/api/2.0/mlflow/experiments/search?max_results=1"
}

up() {
    local name python
    python=$(dirname "$MLFLOW")/python
    server_alive || vacant "$PORT"
    postgres_alive || vacant $((PORT + 1))
    mkdir -p "$LOG"
    PASSWORD=${PASSWORD:-$(secret)}
    (umask 077; echo "$PASSWORD" >"$DATA/password")
    if [ ! -e "$DATA/postgres.done" ]; then
        rm -rf "$DATA/postgres"
        (umask 077; secret >"$DATA/postgres.secret"; echo "127.0.0.1:*:*:mlflow:$(cat "$DATA/postgres.secret")" >"$PGPASSFILE")
        as_nobody "$POSTGRES/initdb" -D "$DATA/postgres" -U mlflow --auth=scram-sha-256 --pwfile="$DATA/postgres.secret" \
            -E UTF8 --locale=C.UTF-8 >"$LOG/initdb.out" 2>&1 \
            || { tail -n 5 "$LOG/initdb.out" >&2; fail "initdb failed; see $LOG/initdb.out"; }
        touch "$DATA/postgres.done"
    fi
    if ! postgres_alive; then
        rm -f "$DATA/postgres/postmaster.pid" # of one that was killed
        # shellcheck disable=SC2046  # as_nobody's unshare becomes postgres: one process, one number
        spawn postgres $([ "$(id -u)" != 0 ] || echo unshare --user --map-user=1000 --map-group=1000) \
            "$POSTGRES/postgres" -D "$DATA/postgres" -p $((PORT + 1)) -c listen_addresses=127.0.0.1 \
            -c unix_socket_directories= -c max_connections=200
        await takes_queries postgres
    fi
    for name in mlflow users; do
        "$POSTGRES/psql" -w -h 127.0.0.1 -p $((PORT + 1)) -U mlflow -d postgres -tAc "SELECT 1 FROM pg_database WHERE datname = '$name'" \
            | grep -q 1 || "$POSTGRES/createdb" -w -h 127.0.0.1 -p $((PORT + 1)) -U mlflow "$name"
    done
    "$python" - "$ARTIFACTS" <<'END' || fail "the bucket of $ARTIFACTS cannot be had: is AWS_ENDPOINT_URL set? eval \"\$(infra/local/s3.sh up)\""
import sys
import fsspec
from urllib.parse import urlsplit
bucket, s3 = urlsplit(sys.argv[1]).netloc, fsspec.filesystem("s3")
s3.exists(bucket) or s3.mkdir(bucket)
END
    if ! server_alive; then
        [ -s "$DATA/secret" ] || (umask 077; secret >"$DATA/secret")
        (umask 077; cat >"$DATA/users.ini" <<END
[mlflow]
default_permission = READ
database_uri = $STORE/users
admin_username = $ADMIN
admin_password = ${PASSWORD//%/%%}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
        )
        MLFLOW_AUTH_CONFIG_PATH=$DATA/users.ini MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$DATA/secret") \
            MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false PYTHONPATH='' \
            spawn server "$MLFLOW" server --app-name basic-auth --backend-store-uri "$STORE/mlflow" \
            --artifacts-destination "$ARTIFACTS" --host 127.0.0.1 --workers 1 --port "$PORT" \
            --allowed-hosts "localhost,localhost:*,127.0.0.1,127.0.0.1:*${MLFLOW_HOSTS:+,$MLFLOW_HOSTS}"
    fi
    await answers server
}

end() { # NAME SIGNAL: it and all of its session, or what is left of that after ten seconds
    local pid; pid=$(pid_of "$1")
    kill -"$2" -- "-$pid" || true
    for _ in $(seq 100); do kill -0 -- "-$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -KILL -- "-$pid" || true
}

stop() {
    if server_alive; then end server TERM; fi
    if postgres_alive; then end postgres INT; fi
    rm -f "$DATA/server.pid" "$DATA/postgres.pid"
}

show() {
    echo "export MLFLOW_TRACKING_URI=http://127.0.0.1:$PORT"
    printf 'export MLFLOW_TRACKING_USERNAME=%q MLFLOW_TRACKING_PASSWORD=%q\n' "$ADMIN" "$PASSWORD"
}

alone() { # COMMAND…: while no other works on the same folder
    (flock 9; "$@") 9>"$DATA/lock"
}
wipe() {
    stop
    rm -rf "$DATA"
}

case $COMMAND in
    check) find_programs ;;
    up)
        find_programs
        mkdir -p "$DATA"
        alone up
        PASSWORD=$(cat "$DATA/password")
        show
        ;;
    stop) [ ! -e "$DATA/postgres.secret" ] || alone stop ;;
    status) if answers; then echo healthy; else echo down; exit 1; fi ;;
    env) show ;;
    wipe)
        [ ! -e "$DATA" ] || [ -e "$DATA/postgres.secret" ] || fail "$DATA is not one of ours: it stays"
        [ ! -e "$DATA" ] || alone wipe
        ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
