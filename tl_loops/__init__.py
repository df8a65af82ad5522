"""Looped (recurrent-depth) transformer language models inside TransformerLens."""
