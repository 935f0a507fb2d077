#!/bin/sh
# Starts the SuperNode: it fetches messages from the SuperLink, hands them to the worker, and sends its answers back.
# Ends with 77 where Flower ended it by itself: its key was refused, or the clock is off. Starting it again is no help.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
# A proxy in the environment (HTTPS_PROXY) is for the way out: what runs on this machine is never reached through it.
NO_PROXY="${no_proxy:-${NO_PROXY:-}}"
export NO_PROXY="${NO_PROXY:+$NO_PROXY,}127.0.0.1,localhost,::1"
export no_proxy="$NO_PROXY"
# How often Flower's SuperExec looks for a message to work on; every message waits for it, by its own setting 1 s.
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.2}"
umask 077
mkdir -p flwr
# The SuperNode must not outlive this script, however that ends.
guard=
if command -v setpriv > /dev/null && setpriv --pdeathsig KILL true 2> /dev/null; then guard="setpriv --pdeathsig KILL"; fi
told= node=
trap 'told=yes; kill -TERM "$node" 2> /dev/null || :' TERM INT HUP
$guard flower-supernode \
    --superlink %{address} \
    --root-certificates ca.pem \
    --auth-supernode-private-key node.key \
    --host 127.0.0.1 --port %{node_port} \
    --node-config "worker-socket=\"$PWD/worker.sock\" worker-token=\"$PWD/worker.token\"" "$@" &
node=$!
code=0
wait "$node" || code=$?
if [ -n "$told" ]; then
    wait "$node" || :
    exit 0
fi
if [ "$code" -eq 0 ]; then
    echo "supernode.sh: Flower ended the SuperNode, though nobody asked for it. Its key is not let in or was revoked, or" \
        "this machine's clock is off: run \`fedloom federation doctor $PWD\`, and have the operator run" \
        "\`fedloom federation list\`." >&2
    exit 77
fi
exit "$code"
