"""Measurements behind the figures in the documentation. Not part of the wheel."""
