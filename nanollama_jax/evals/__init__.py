"""Tokens to scores."""
