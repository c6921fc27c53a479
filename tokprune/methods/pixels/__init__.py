"""Methods of the pixels stage: units that the vision tower need not encode, a file each."""
