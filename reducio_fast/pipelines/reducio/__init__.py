"""The Reducio family."""
