#!/bin/sh
# Starts the SuperNode: it fetches messages from the SuperLink, hands them to the worker, and sends its answers back.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
umask 077
mkdir -p flwr
exec flower-supernode \
    --superlink %{address} \
    --root-certificates ca.pem \
    --auth-supernode-private-key node.key \
    --host 127.0.0.1 --port %{node_port} \
    --node-config "worker-socket=\"$PWD/worker.sock\" worker-token=\"$PWD/worker.token\"" "$@"
