"""Everything that knows Ray, HTTP or storage: ingress, routing, replicas, configuration, command line."""
