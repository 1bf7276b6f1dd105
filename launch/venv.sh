# Sets `venv`, the environment that is installed into and used: the active one, virtual or conda's (other than base),
# else .venv in the current folder. To be sourced; setup.sh makes it.
venv=${VIRTUAL_ENV:-}
if [ -z "$venv" ] && [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    venv=$CONDA_PREFIX
fi
venv=${venv:-$PWD/.venv}
