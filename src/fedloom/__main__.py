"""`python -m fedloom`: the same as the `fedloom` command."""

from fedloom.cli import main

main()
