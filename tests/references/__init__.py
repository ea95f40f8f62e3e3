"""float64 oracles written from the papers' algorithms: explicit, slow, and independent of the library."""
