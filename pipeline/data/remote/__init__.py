"""Shards that are not on this machine."""
