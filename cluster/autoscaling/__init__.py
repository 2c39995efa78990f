"""How many replicas a model needs: what they report, a policy as a pure function, and the adapter to Ray Serve."""
