"""The model: its configuration, one decoder for every supported architecture, and how weights get into it."""
