#!/usr/bin/env bash
# The main job from scratch: set up, fetch Fashion-MNIST, train G and D over two processes with the L2 penalty and
# once more without, score both on held-out images and draw them side by side. About eleven minutes of two CPU
# cores that have bf16, set-up included; GPUs are used if there are any. Run it again to resume. Further settings
# (key=value) go to both trainings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
source launch/venv.sh
shardgan=$venv/bin/shardgan

data=data/fashion-mnist
[ -f "$data/index.json" ] || "$shardgan" prepare fashion-mnist "$data"

# One process per GPU, or two on CPUs; bf16 where there are instructions for it, as it is slow without.
read -r procs precision < <("$venv/bin/python" -c '
import torch
from pipeline.parallel.gpus import gpus
from pipeline.parallel.launched import emulated
device = torch.device("cuda" if gpus() else "cpu")
print(gpus() or 2, "no" if emulated("bf16", device) else "bf16")')
train() {
    "$shardgan" train configs/fashion-mnist.yaml --procs "$procs" --mixed_precision $precision "$@"
}
run=runs/fashion-mnist without=runs/fashion-mnist-without-l2
train "$@"
[ -f "$run/DONE" ] || exit 0
train "$@" run.name="${without#runs/}" penalty.l2=0
[ -f "$without/DONE" ] || exit 0

"$shardgan" compare "$without" "$run" --out runs/strip.png
cat <<TEXT

Look at runs/strip.png, and open $run/report.html in a browser. Try next:
  $shardgan sample $run --out more.png --count 96 --interpolate
  $shardgan select configs/lambda.yaml --grid penalty.l2=0,1e-3:1:4 --folds 3      a pair in which λ shows
  $shardgan train configs/cifar10.yaml          after: $shardgan prepare cifar10 data/cifar10
TEXT
