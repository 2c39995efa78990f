"""Leases for a whole Ray cluster: the table of ``workers.leases`` in a named actor, and its client."""
