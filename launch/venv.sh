# To be sourced: sets `venv` to the active environment, virtual or conda's (other than base), else to .venv in the
# current folder, which setup.sh makes.
venv=${VIRTUAL_ENV:-}
if [ -z "$venv" ] && [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    venv=$CONDA_PREFIX
fi
venv=${venv:-$PWD/.venv}
