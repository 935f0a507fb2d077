"""PEFT adapter folders, read, written and merged; no base model is loaded."""
