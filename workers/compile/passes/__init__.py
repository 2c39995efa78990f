"""Fusion passes over the full graph, before it is split."""
