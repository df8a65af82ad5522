"""Looped models as Hugging Face modules, for TransformerBridge to wrap.

The released modelling files are remote code, which is not run here. These modules have the same
tree of submodules, parameter names and mathematics; a test holds them to the reference numbers of
``tests/parity``.
"""
