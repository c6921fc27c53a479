"""Methods of the encoder stage."""
