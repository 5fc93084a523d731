"""Readers of data sets: file or folder -> Source."""
