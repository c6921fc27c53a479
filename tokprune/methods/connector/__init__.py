"""Methods of the connector stage."""
