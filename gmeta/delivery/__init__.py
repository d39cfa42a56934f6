"""Delivery: from a trained run to a version that serves, day after day."""
