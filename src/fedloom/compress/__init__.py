"""What travels: entries, masks, seeds, quantised values, and the choice of elements under a budget."""
