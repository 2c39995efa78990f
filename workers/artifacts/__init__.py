"""Signed bundles of compiled artifacts in shared stores: bytes, keys and trust. Importing it imports nothing heavy.

Knows nothing of what the bytes do when they are loaded; that is the compile layer's and the runner's business.
See docs/artifacts.md.
"""
