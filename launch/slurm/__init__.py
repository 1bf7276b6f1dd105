"""Slurm, one launcher among possible others: another needs what jobs.py has: render, submit, state."""
