"""Methods of the cache stage."""
