"""Tuning: what to try, how far, and what came out (`gmeta tune`)."""
