"""Weights to other programs' formats, and back."""
