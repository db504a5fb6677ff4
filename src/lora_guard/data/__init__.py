"""Labelled rows: their form, where they are read from, how they are split and batched."""
