"""Commands that set methods side by side, before training and by training."""
