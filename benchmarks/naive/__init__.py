"""The published ways of computing the connector methods, for benchmarks/methods.py to race against.

Every function is written from the description of a publication's arithmetic, keeping its manner: what is recomputed at
each pick, what is copied, where Python loops over tokens, where the host waits. They take what the functions of
tokprune.methods take and return what those return. `pairs.py` puts the two side by side.
"""
