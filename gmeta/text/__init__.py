"""Text: an encoder split at a layer, and the store of what its lower part makes of short texts (BAHE, 2403.19347)."""
