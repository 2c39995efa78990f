"""The graph layer: forward context, captured graphs, dispatch."""
