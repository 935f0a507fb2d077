"""The tables of a settings file, one record each; `records.config.Config` is the whole of it."""
