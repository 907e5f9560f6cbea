"""Tiny models of every family with random weights, built offline, and the parity check that all of them share."""
