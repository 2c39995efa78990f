"""Which replica gets a request: policies as pure functions, and the adapter to Ray Serve's request router."""
