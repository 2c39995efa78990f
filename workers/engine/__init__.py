"""The engine: requests in, token chunks out. ``Engine`` is the synchronous core, ``EngineThread`` runs one."""
