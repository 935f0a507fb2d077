"""The base model of the real-text testbeds: its corpus, tokenizer, training and weights, made from Debian packages."""
