"""What never runs in a rank: images → shards, and their verification."""
