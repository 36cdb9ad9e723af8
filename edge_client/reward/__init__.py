"""Reward models: small heads on features of a frozen trunk, and what their scores are worth."""
