"""Slurm, one launcher among possible others."""
