"""What Python sees: runs, comparisons and merges as values that can be held, drawn and opened."""
