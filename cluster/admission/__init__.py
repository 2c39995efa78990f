"""Who may ask for how much, and who waits how long: keys, limits, the queue in front of the replicas, deadlines.

Plain logic with the clock passed in, so that it is tested without a cluster. Knows neither HTTP nor Ray.
"""
