"""What is installed as `shardgan`: a name of our own, where `pipeline` and `launch` may be others' too."""
