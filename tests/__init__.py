"""Tests of the programs, and a soak test: python -m tests.soak."""
