#!/bin/sh
# Starts the SuperLink. Nothing but this machine reaches it: the proxy passes on what the sites may ask for.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
# A proxy in the environment (HTTPS_PROXY) is for the way out: what runs on this machine is never reached through it.
NO_PROXY="${no_proxy:-${NO_PROXY:-}}"
export NO_PROXY="${NO_PROXY:+$NO_PROXY,}127.0.0.1,localhost,::1"
export no_proxy="$NO_PROXY"
# How often Flower's SuperExec looks for a run that waits to begin; its own 1 s is waited for at the start of every run.
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.25}"
# Every update of every site passes through the database: for this user alone, also what was written before.
umask 077
mkdir -p state
chmod -R go-rwx state
exec flower-superlink \
    --host %{listen_host} --port %{listen_port} \
    --ssl-certfile server.pem --ssl-keyfile server.key --ssl-ca-certfile ca.pem \
    --enable-supernode-auth \
    --disable-runtime-dependency-installation \
    --database state/superlink.db "$@"
