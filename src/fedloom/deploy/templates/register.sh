#!/bin/sh
# Lets in the sites whose public keys are in nodes/, and takes out those in revoked/. Run it once the SuperLink runs, and
# again after every `fedloom federation add`, `revoke` or `rotate`. What is done already stays as it is.
set -eu
cd "$(dirname "$0")"
exec fedloom federation register . "$@"
