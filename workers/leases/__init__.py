"""Leases: who may do a piece of work that one process should do for all. Knows names and owners, not the work."""
