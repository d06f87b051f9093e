"""Metrics and probes; everything works offline."""
