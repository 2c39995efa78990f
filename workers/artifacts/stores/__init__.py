"""Stores: where bytes lie. A store knows names and bytes; nothing of manifests, keys or trust."""
