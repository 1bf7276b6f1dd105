"""Who is alive, and what each rank is doing."""
