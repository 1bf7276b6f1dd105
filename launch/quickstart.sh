#!/usr/bin/env bash
# The main job from scratch: set up, fetch Fashion-MNIST, train G and D with L2 penalties over two processes,
# score G on held-out images. About ten minutes on two CPU cores; a GPU is used if there is one.
# Run it again to resume. Further settings (key=value) go to `shardgan train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source launch/venv.sh
shardgan=$venv/bin/shardgan

data=data/fashion-mnist
[ -f "$data/index.json" ] || "$shardgan" prepare fashion-mnist "$data"

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
"$shardgan" train configs/fashion-mnist.yaml --procs "$((gpus > 0 ? gpus : 2))" --mixed_precision bf16 "$@"

run=runs/fashion-mnist
[ -f "$run/DONE" ] || exit 0
cat <<TEXT

Open $run/report.html in a browser. Try next:
  $shardgan sample $run --out more.png --count 100 --interpolate
  $shardgan select configs/lambda.yaml --grid penalty.l2=0,1e-3:1:4 --folds 3      a pair in which λ shows
  $shardgan train configs/cifar10.yaml          after: $shardgan prepare cifar10 data/cifar10
TEXT
