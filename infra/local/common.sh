# shellcheck shell=bash
# What s3.sh, mlflow.sh and stack.sh have in common; each reads it when it has said COMMAND, DATA (the folder of what it
# keeps) and OURS (a file in it that says whose it is).
#
# What a script keeps running has a name. $DATA/NAME.pid has the number of its first process, $DATA/log/NAME.out what it
# said, and all that it starts inherits a mark, by which, and nothing else, it is known.
# shellcheck disable=SC2034  # it is they who use it
HERE=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
LOG=$DATA/log
# A proxy would be told our secrets, and its answers be taken for ours.
case ",${no_proxy:=${NO_PROXY:-}}," in
    *,127.0.0.1,* | ',*,') ;;
    *) no_proxy=127.0.0.1${no_proxy:+,$no_proxy} ;;
esac
export no_proxy

fail() { echo "${0##*/}: $*" >&2; exit 1; }
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
need() { local tool; for tool in "$@"; do command -v "$tool" >/dev/null || fail "$tool is needed"; done; }
show_no_proxy() { printf 'export no_proxy=%q\n' "$no_proxy"; }
ask() { curl --noproxy '*' -fs -o /dev/null "$@"; }

# --- the folder -------------------------------------------------------------------------------------------------------

ours() { [ -e "$DATA/$OURS" ]; }
may_have() { # NAME…: what may be there before the first start; whatever else is would be removed by `wipe`
    local name but=()
    for name in "$@"; do but+=(! -name "$name"); done
    ours || [ -z "$(find "$DATA" -mindepth 1 -maxdepth 1 "${but[@]}" -print -quit 2>/dev/null)" ] \
        || fail "$DATA is not one of ours, and not empty: give another folder"
}

alone() { # COMMAND…: while no other works on the same folder
    (
        # `wipe` removes the lock as well: who has waited for it then holds one that nobody else finds.
        until [ "$DATA/lock" -ef /dev/fd/9 ]; do
            if [ "$COMMAND" = up ]; then mkdir -p "$DATA"; fi
            [ -d "$DATA" ] || exit 0
            exec 9>"$DATA/lock" || { [ ! -d "$DATA" ] || exit 1; continue; }
            flock -w 900 9 || fail "another works on $DATA since 15 minutes"
        done
        "$@"
    )
}

remove() { # DATA; what says whose it is goes last, so that half of it can be wiped another time
    find "$DATA" -mindepth 1 -maxdepth 1 ! -name "$OURS" ! -name lock -exec rm -rf {} +
    rm -f "$DATA/$OURS"
    rm -f "$DATA/lock"
    rmdir "$DATA" 2>/dev/null || true # unless another begins anew there
}

secret() { # NAME: it, made up at the first time
    [ -s "$DATA/$1" ] || (umask 077; head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1 >"$DATA/$1")
    cat "$DATA/$1"
}

# Sockets, whose names have at most 107 bytes, lie elsewhere: in RUN, which is where it was whatever TMPDIR says later,
# and gone when nothing runs, since anybody can make a folder of that name. Its file `of` says whose it is: another DATA
# takes it over when it starts at the port of one that was killed.
private() { [ -O "$1" ] && [ ! -L "$1" ]; }
settle() { # NAME
    RUN=$(cat "$DATA/run" 2>/dev/null || true)
    private "$RUN" || RUN=${TMPDIR:-/tmp}/brickyard-$1
    (umask 077; mkdir -p "$RUN") || fail "$RUN cannot be made: give another TMPDIR"
    private "$RUN" || fail "$RUN is another's: give another TMPDIR"
    echo "$DATA" >"$RUN/of"
    echo "$RUN" >"$DATA/run"
}
leave() {
    local run
    run=$(cat "$DATA/run" 2>/dev/null) || return 0
    if private "$run" && [ "$(cat "$run/of" 2>/dev/null)" = "$DATA" ]; then rm -rf "$run"; fi
    rm -f "$DATA/run"
}

# --- ports ------------------------------------------------------------------------------------------------------------

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
vacant() { # SETTING PORT…: nobody may listen there but whom we start, or their answers would be taken for ours
    local setting=$1 port; shift
    for port in "$@"; do
        for _ in $(seq 10); do listens "$port" || continue 2; sleep 0.1; done # what was killed may still be about to go
        fail "port $port is another's: end that, or give another $setting"
    done
}

# --- what runs --------------------------------------------------------------------------------------------------------

mark() { echo "BRICKYARD_LOCAL=$DATA:$1"; }
pid_of() { cat "$DATA/$1.pid" 2>/dev/null; }
alive() { # NAME: its first process is there, neither as a zombie nor as another that got its number
    local pid; pid=$(pid_of "$1") && grep -qszxF -- "$(mark "$1")" "/proc/$pid/environ"
}
of() { # NAME: the numbers of all that is there of it; processes may end, or be others', while they are looked at
    { grep -lszxF -- "$(mark "$1")" /proc/[0-9]*/environ || true; } | cut -d / -f 3
}
names() { # those of which anything is there
    local line start; start=$(mark "")
    { grep -hszF -- "$start" /proc/[0-9]*/environ || true; } | tr '\0' '\n' \
        | while read -r line; do [[ $line != "$start"* ]] || echo "${line#"$start"}"; done | sort -u
}

# SPT_NOENV: else the names that Ray's agents give themselves are written over their mark.
spawn() { # NAME COMMAND…: as a process group of its own; 9 is the lock, which must not outlive us
    local name=$1; shift
    env SPT_NOENV=1 "$(mark "$name")" setsid "$@" >>"$LOG/$name.out" 2>&1 </dev/null 9>&- &
    echo $! >"$DATA/$name.pid"
}

await() { # NAME CONDITION…: until it holds, while the process lives, which may not have come as far as its mark
    local name=$1 until=$((SECONDS + 300)); shift
    while ((SECONDS < until)); do
        if "$@"; then return 0; fi
        kill -0 "$(pid_of "$name")" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 15 "$LOG/$name.out" >&2
    fail "$name did not come up; see $LOG${MORE_LOGS:+ and $MORE_LOGS}"
}

bury() { # NAME…: what is there of it, the hard way
    local name pids
    for name in "$@"; do
        for _ in $(seq 300); do
            pids=$(of "$name")
            [ -n "$pids" ] || break
            # shellcheck disable=SC2086  # several
            kill -KILL $pids 2>/dev/null || true
            sleep 0.1
        done
        [ -z "$pids" ] || fail "$name cannot be ended: $pids"
        rm -f "$DATA/$name.pid"
    done
}

end() { # NAME SIGNAL: all of its group is told, and has ten seconds; what its first process has left when it died has not
    if alive "$1"; then
        kill -"$2" -- "-$(pid_of "$1")" || true
        for _ in $(seq 100); do [ -n "$(of "$1")" ] || break; sleep 0.1; done
    fi
    bury "$1"
}
