"""Methods of the frames stage."""
