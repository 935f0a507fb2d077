#!/bin/sh
# Lets the sites in: registers the public key of every site in nodes/. Run it once the SuperLink runs, and again for
# every new site; keys that are registered already are refused, which does no harm.
set -eu
cd "$(dirname "$0")"
export FLWR_HOME="$PWD/flwr"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
for key in nodes/*.pub; do
    name=$(basename "$key" .pub)
    flwr supernode register "$key" federation --name "$name" || echo "$name: not registered (it may be already)"
done
flwr supernode list federation
