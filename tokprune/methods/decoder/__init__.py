"""Methods of the decoder stage."""
