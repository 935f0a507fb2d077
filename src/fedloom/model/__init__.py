"""One client's work: base model, examples, tokens, training, scores."""
