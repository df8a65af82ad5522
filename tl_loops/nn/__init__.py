"""The components of a looped transformer, under TransformerLens's hook and weight names."""
