#!/bin/sh
# Starts the SuperLink. Nothing but this machine reaches it: the proxy passes on what the sites may ask for.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
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
