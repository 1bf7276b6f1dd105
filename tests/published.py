"""The files in configs/: which are configs, and which are candidates for `select --arms`."""

from launch.installed import configs

ARMS = {
    "alternatives": "lambda",
    "alternatives-longer": "lambda",
    "weights-or-effective": "stylegan2-small",
}  # candidates, and for which config
PUBLISHED = sorted(path for path in configs().glob("*.yaml") if path.stem not in ARMS)
