#!/usr/bin/env bash
# Runs once per node: sets up the node's environment, then becomes its share of the training. Called by train.sbatch,
# which documents the variables.   node.sh plan|check|train CONFIG [key=value …]   or   node.sh python MODULE [argument …]
set -eo pipefail +u
unset OMP_PROC_BIND OMP_PLACES GOMP_CPU_AFFINITY # by which torch binds all processes to one core
node=${SLURMD_NODENAME:-$(hostname)}
fail() {
    echo "error: $node: $*" >&2
    exit 2
}

if [ -n "$SHARDGAN_MODULES" ]; then
    for profile in /etc/profile.d/*modules.sh /etc/profile.d/*lmod*.sh; do
        type module >/dev/null 2>&1 || { [ -f "$profile" ] && source "$profile"; } || true
    done
    type module >/dev/null 2>&1 || fail "SHARDGAN_MODULES is set, but there is no \`module\` command"
    # shellcheck disable=SC2086
    module load $SHARDGAN_MODULES >&2 || fail "\`module load $SHARDGAN_MODULES\` failed"
fi

private() { # a folder in one that is ours alone
    (umask 077 && mkdir -p "$1") 2>/dev/null && [ -O "${1%/*}" ] && [ -w "$1" ]
}
local=${SHARDGAN_LOCAL:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/shardgan-$(id -u)}
[ ! -d "$local" ] || [ -O "$local" ] || local=$local/shardgan-$(id -u) # a disk that all users share
temporary=$local/tmp
private "$temporary" || fail "$local cannot be written. Set SHARDGAN_LOCAL to a folder of yours on the nodes' own disks"
# The path of a socket may have 107 letters, and Python's worker processes need 34 of them below TMPDIR.
if [ ${#temporary} -gt 73 ]; then
    shorter="Set SHARDGAN_LOCAL to a folder on the nodes' own disks whose path has at most 69 letters"
    [ -z "$SHARDGAN_LOCAL" ] || fail "SHARDGAN_LOCAL=$local is too long for sockets. $shorter"
    temporary=/tmp/shardgan-$(id -u)/tmp
    private "$temporary" || fail "$local is too long for sockets, and $temporary cannot be written. $shorter"
fi

source "$SHARDGAN_CODE/launch/venv.sh"
venv=${SHARDGAN_VENV-$venv}
case $venv in
    *.tar | *.tar.*)
        [ -f "$venv" ] || fail "there is no $venv (SHARDGAN_VENV)"
        unpacked=$local/venv-$(stat --format=%s-%Y "$venv" | cksum | cut -d ' ' -f 1)
        if [ ! -d "$unpacked" ]; then
            partial=$(mktemp -d "$local/venv.XXXXXX")
            tar -xf "$venv" -C "$partial" || fail "$venv cannot be unpacked into $local"
            mv -T "$partial" "$unpacked" 2>/dev/null || rm -rf "$partial" # another job on this node was faster
        fi
        python=$(find "$unpacked" -maxdepth 3 -path '*/bin/python' | head -n 1)
        [ -n "$python" ] || fail "$venv holds no bin/python"
        ;;
    ?*)
        python=$venv/bin/python
        # A system's Python may have no such name there.
        [[ -x $python || -n ${SHARDGAN_VENV-} ]] || python=${SHARDGAN_PYTHON:-$python}
        ;;
    *) python=python3 ;;
esac
if [[ -n $SHARDGAN_CONTAINER || $SHARDGAN_SRUN == *--container* ]]; then
    [ -n "${SHARDGAN_VENV-}" ] || python=python3
elif [[ -L $python && ! -e $python ]]; then
    fail "$python leads to $(readlink -m "$python"), which is not on this node. Make the environment from a Python that all" \
        "nodes have, or name its module in SHARDGAN_MODULES"
elif ! command -v "$python" >/dev/null; then
    fail "no virtual environment at $venv. Make one where all nodes see it (bash launch/setup.sh) and set SHARDGAN_VENV"
fi

export TMPDIR=$temporary SHARDGAN_CACHE=${SHARDGAN_CACHE:-$local/cache}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$local/inductor}
export WANDB_MODE=${WANDB_MODE:-offline}
# Our code comes first: a user's networks are found where the job runs, but no file there hides a module.
export PYTHONSAFEPATH=1 PYTHONPATH=$SHARDGAN_CODE${PYTHONPATH:+:$PYTHONPATH}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
if [ -n "$SHARDGAN_INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$SHARDGAN_INTERFACE GLOO_SOCKET_IFNAME=$SHARDGAN_INTERFACE
fi
# A node may have GPUs that Slurm does not manage. If allocated GPUs cannot be used, `check` refuses: no fall back to CPUs.
if [ -z "$ACCELERATE_USE_CPU" ]; then
    unset ACCELERATE_USE_CPU
    [[ -n $SLURM_GPUS_ON_NODE || $(nvidia-smi -L 2>/dev/null || true) == "GPU "* ]] || export ACCELERATE_USE_CPU=1
fi
case ${ACCELERATE_USE_CPU,,} in
    1 | true | yes) export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} ;;
    *) unset DS_ACCELERATOR ;;
esac
# Variables of other launchers, and of a W&B service, from the shell that submitted the job; srun itself sets those of
# MPI.
for name in $(compgen -e); do
    case $name in
        ACCELERATE_USE_CPU) ;;
        RANK | LOCAL_RANK | GROUP_RANK | ROLE_RANK | NODE_RANK | CROSS_RANK | WORLD_SIZE | LOCAL_WORLD_SIZE | \
            GROUP_WORLD_SIZE | ROLE_WORLD_SIZE | LOCAL_SIZE | CROSS_SIZE | ROLE_NAME | MASTER_ADDR | MASTER_PORT | \
            FORK_LAUNCHED | TORCHELASTIC_* | PET_* | OMPI_* | PMI_* | PMIX_* | MV2_* | MPI_LOCALNRANKS | \
            MPI_LOCALRANKID | WANDB_SERVICE | ACCELERATE_* | FSDP_* | MEGATRON_LM_* | PARALLELISM_CONFIG_*) unset "$name" ;;
    esac
done
export SHARDGAN_PROCS=${SHARDGAN_PROCS:-${SLURM_GPUS_ON_NODE:-1}}
procs=$SHARDGAN_PROCS
[[ $procs =~ ^[1-9][0-9]{0,3}$ ]] || fail "SHARDGAN_PROCS=$procs is not a number of processes"
nodes=$SLURM_JOB_NUM_NODES # of the job; SLURM_NNODES is of this step
world=$((nodes * procs))
cpus=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}}
export SHARDGAN_CPUS=$cpus
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > procs ? cpus / procs : 1))}
OMP_NUM_THREADS=${OMP_NUM_THREADS%%,*} # the first of a list for nested parallelism
[[ $OMP_NUM_THREADS =~ ^[1-9][0-9]*$ ]] || fail "OMP_NUM_THREADS=$OMP_NUM_THREADS is not a number of threads"
strategy=${SHARDGAN_STRATEGY:-$([ $world = 1 ] && echo single || echo ddp)}

run() {
    # shellcheck disable=SC2086
    exec $SHARDGAN_CONTAINER "$python" -m "$@"
}
export SHARDGAN_NODE=$node
task=$1
shift
if [ "$task" = python ]; then
    run "$@"
elif [ "$task" = plan ]; then
    [ -f "$SHARDGAN_CODE/launch/accelerate/$strategy.yaml" ] || fail "SHARDGAN_STRATEGY=$strategy: there is no such strategy"
    [ "$strategy" != single ] || [ $world = 1 ] || fail "SHARDGAN_STRATEGY=single is one process; here are $world"
    echo "$strategy; nodes: $nodes, processes on each: $procs, CPUs on each: $cpus ($SLURM_JOB_NODELIST)" >&2
    run launch.slurm.nodes plan "$world" "$@"
elif [ "$task" = check ]; then
    run launch.slurm.nodes check "$SHARDGAN_NODES" "$@"
fi
# A signal to the step is for the training processes, which save and end. Their launcher would die of it or end them, so
# it ignores it (launch/launcher.py does so again, as a container may reset this).
trap '' USR1 USR2 HUP TERM
export ACCELERATE_MIXED_PRECISION=${SHARDGAN_PRECISION:-no} ACCELERATE_DYNAMO_BACKEND=${SHARDGAN_COMPILE:-no}
[ "$strategy" != single ] || run pipeline.train "$@"
run launch.launcher --config_file "$SHARDGAN_CODE/launch/accelerate/$strategy.yaml" \
    --num_machines "$nodes" --num_processes "$world" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$SHARDGAN_HEAD" --main_process_port "$SHARDGAN_HEAD_PORT" \
    --mixed_precision "$ACCELERATE_MIXED_PRECISION" --dynamo_backend "$ACCELERATE_DYNAMO_BACKEND" \
    -m pipeline.train "$@"
