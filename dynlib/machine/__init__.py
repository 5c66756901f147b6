"""The real thing: knobs, sensors, process limits, a lease that puts everything back."""
