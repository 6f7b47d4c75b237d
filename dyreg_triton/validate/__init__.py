"""Argument checks, one file per op; `_core.validation` has what they share with the layers."""
