"""Memory of the stages: forecasts, the choice of a way that fits, and offloading of weights."""
