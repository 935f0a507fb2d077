"""How it is combined: one file a paper, one row a method in `table`."""
