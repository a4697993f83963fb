#!/usr/bin/env bash
# A real MLflow server on loopback, for tests and for trying things: mlflow.sh {check|up|stop|status|env|wipe} [DATA] [PORT]
#
#   check   say if a program is missing that `up` needs, or a port is another's; exit 1 then
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
COMMAND=${1:-} DATA=$(realpath -m "${2:-$CACHE/mlflow}") PORT=${3:-5000} OURS=postgres.secret
# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ARTIFACTS=${MLFLOW_ARTIFACTS:-s3://mlflow} ADMIN=${MLFLOW_USER:-brickyard} PASSWORD=$(cat "$DATA/password" 2>/dev/null || echo "${MLFLOW_PASSWORD:-}")
STORE=postgresql+psycopg://mlflow@127.0.0.1:$((PORT + 1))

export PGPASSFILE=$DATA/pgpass # for PostgreSQL, of which nobody needs to know the password

find_programs() {
    local candidate
    need curl flock setsid unshare
    MLFLOW=${MLFLOW_BIN:-$HERE/../../.venv/bin/mlflow}
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

takes_queries() { "$POSTGRES/pg_isready" -q -h 127.0.0.1 -p $((PORT + 1)) -U mlflow -d postgres; }
is_here() { # at this port, and not at another that it was once started with
    alive server && tr '\0' ' ' 2>/dev/null <"/proc/$(pid_of server)/cmdline" | grep -qF -- " --port $PORT "
}
answers() { # one of ours: any other would be told our password
    is_here || return 1
    # By its standard input: what stands on a command line everybody on this machine can read.
    # shellcheck disable=SC2001  # of two characters
    printf 'user = "%s"\n' "$(sed 's/[\\"]/\\&/g' <<<"$ADMIN:$PASSWORD")" \
        | ask -m 10 -K - "http://127.0.0.1:$PORT/api/2.0/mlflow/experiments/search?max_results=1"
}

find_room() { # for what is not there of ours
    local setting="PORT (MLFLOW_PORT of stack.sh)"
    [ -n "$(of server)" ] || vacant "$setting" "$PORT"
    [ -n "$(of postgres)" ] || vacant "$setting" $((PORT + 1))
}

up() {
    local name python
    python=$(dirname "$MLFLOW")/python
    for name in server postgres; do alive "$name" || bury "$name"; done # its first process may have left others
    find_room
    ! alive server || is_here || fail "it listens at another port: stop it first"
    secret postgres.secret >/dev/null # the first thing there: it says whose it is
    mkdir -p "$LOG"
    [ -s "$DATA/password" ] || [ -z "${MLFLOW_PASSWORD:-}" ] || (umask 077; echo "$MLFLOW_PASSWORD" >"$DATA/password")
    PASSWORD=$(secret password)
    if [ ! -e "$DATA/postgres.done" ]; then
        rm -rf "$DATA/postgres"
        (umask 077; echo "127.0.0.1:*:*:mlflow:$(cat "$DATA/postgres.secret")" >"$PGPASSFILE")
        as_nobody "$POSTGRES/initdb" -D "$DATA/postgres" -U mlflow --auth=scram-sha-256 --pwfile="$DATA/postgres.secret" \
            -E UTF8 --locale=C.UTF-8 >"$LOG/initdb.out" 2>&1 \
            || { tail -n 5 "$LOG/initdb.out" >&2; fail "initdb failed; see $LOG/initdb.out"; }
        touch "$DATA/postgres.done"
    fi
    if ! alive postgres; then
        # Of one that was killed. Its parts bear no mark, since they write their names over it; they leave by themselves.
        for _ in $(seq 100); do
            [ -n "$(find /proc/[0-9]*/cwd -lname "$DATA/postgres" 2>/dev/null)" ] || break
            sleep 0.1
        done
        rm -f "$DATA/postgres/postmaster.pid"
        # shellcheck disable=SC2046  # as_nobody's unshare becomes postgres: one process, one number
        spawn postgres $([ "$(id -u)" != 0 ] || echo unshare --user --map-user=1000 --map-group=1000) \
            "$POSTGRES/postgres" -D "$DATA/postgres" -p $((PORT + 1)) -c listen_addresses=127.0.0.1 \
            -c unix_socket_directories= -c max_connections=200
        await postgres takes_queries
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
    if ! alive server; then
        (umask 077; cat >"$DATA/users.ini" <<END
[mlflow]
default_permission = READ
database_uri = $STORE/users
admin_username = $ADMIN
admin_password = ${PASSWORD//%/%%}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
        )
        MLFLOW_AUTH_CONFIG_PATH=$DATA/users.ini MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret secret) \
            MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false PYTHONPATH='' \
            spawn server "$MLFLOW" server --app-name basic-auth --backend-store-uri "$STORE/mlflow" \
            --artifacts-destination "$ARTIFACTS" --host 127.0.0.1 --workers 1 --port "$PORT" \
            --allowed-hosts "localhost,localhost:*,127.0.0.1,127.0.0.1:*${MLFLOW_HOSTS:+,$MLFLOW_HOSTS}"
    fi
    await server answers
}

stop() {
    end server TERM
    end postgres INT
}

show() {
    show_no_proxy
    echo "export MLFLOW_TRACKING_URI=http://127.0.0.1:$PORT"
    printf 'export MLFLOW_TRACKING_USERNAME=%q MLFLOW_TRACKING_PASSWORD=%q\n' "$ADMIN" "$PASSWORD"
}

wipe() {
    stop
    remove
}

case $COMMAND in
    check)
        find_programs
        find_room
        ;;
    up)
        find_programs
        may_have lock password # of a backup
        alone up
        PASSWORD=$(cat "$DATA/password")
        show
        ;;
    stop) ! ours || alone stop ;;
    status) if answers; then echo healthy; else echo down; exit 1; fi ;;
    env) show ;;
    wipe)
        ours || [ ! -e "$DATA" ] || fail "$DATA is not one of ours: it stays"
        alone wipe
        ;;
    *) usage ;;
esac
