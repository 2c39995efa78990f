"""Graph backends: CUDA graphs, and the same contract on the host, behind one small interface."""
