"""Seeing the launch overhead: models of it, measurements of it, and the check that graphs compute what they should.

``padding``, ``launches`` and ``crossover`` are pure functions from numbers to rows and know no torch. The rest runs an
engine or a model and counts.
"""
