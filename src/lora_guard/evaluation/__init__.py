"""Evaluation: metrics with intervals, plots, tables, and the run over files."""
