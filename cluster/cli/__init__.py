"""The ``warmgraph`` command: one module per sub-command, all of them thin."""
