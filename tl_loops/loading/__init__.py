"""From a name or a directory to a config, weights and a tokenizer, and back to files."""
