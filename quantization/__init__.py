"""The frozen base: which one it is, loading it at a precision, and what runs on this machine.

Knows nothing of federated learning.
"""
