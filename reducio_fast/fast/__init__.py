"""The fast twins of `reference/`: same classes, same order, same names, built from a reference model."""
