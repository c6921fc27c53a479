"""Methods of the cache stage: what of the visual keys and values each new token reads."""
