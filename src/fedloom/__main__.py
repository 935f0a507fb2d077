"""`python -m fedloom`: the same as the `fedloom` command."""

from fedloom.cli.main import main

main()
