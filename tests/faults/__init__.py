"""Ways to make a broker, or the road to it, fail on purpose."""
