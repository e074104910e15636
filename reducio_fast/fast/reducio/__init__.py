"""Fast twins of the Reducio networks."""
