"""`fedloom node SITE.toml`: carries messages between a SuperLink and a worker, and runs no code of the server."""
