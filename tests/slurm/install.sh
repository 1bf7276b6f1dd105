#!/usr/bin/env bash
# Installs what the tests on a cluster need. Where it cannot, it says so and they are skipped.
set -uo pipefail
export DEBIAN_FRONTEND=noninteractive
for _ in slurmctld slurmd munged ip nsenter; do
    PATH=$PATH:/usr/sbin command -v "$_" >/dev/null || missing=1
done
[ -n "${missing:-}" ] || exit 0
echo "Installing Slurm (for its tests) …"
said=$({ apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge iproute2 util-linux; } 2>&1) ||
    printf 'Slurm cannot be installed here, so its tests are skipped:\n%s\n' "$(tail -n 3 <<<"$said")"
exit 0
