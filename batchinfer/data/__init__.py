"""Parquet in, Parquet out, nothing lost. Never imports torch."""
