"""The Serve application: engine replicas, the fleet that an ingress sees, the ingress itself."""
