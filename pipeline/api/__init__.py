"""Installed as `shardgan`: a name that is only ours, unlike `pipeline` and `launch`."""
