#!/bin/bash
# Stores disks of a running nbdfleece daemon in a restic repository, each as it is at one instant.
#
#   RESTIC_REPOSITORY=/srv/restic RESTIC_PASSWORD_FILE=/etc/restic.pass examples/backup/restic.sh vda vdb
#
# restic finds out by itself what is new, so every run is a full one to read and a small one to keep.
# It cannot know that a stream ended early: then this script makes it forget what it has got.
# Expected: per disk a line "vda: stored as SNAPSHOT"; restore with
#   restic dump SNAPSHOT vda.raw > vda.raw
set -euo pipefail

status=0
for disk in "$@"; do
    if report=$(nbdfleece backup create "$disk" --stdout |
        restic backup --json --stdin --stdin-filename "$disk.raw" --tag nbdfleece); then
        whole=yes
    else
        whole=no
    fi
    snapshot=$(sed -n 's/.*"snapshot_id":"\([0-9a-f]*\)".*/\1/p' <<<"$report" | tail -n 1)
    if [[ $whole == yes && -n $snapshot ]]; then
        echo "$disk: stored as $snapshot"
        continue
    fi
    echo "$disk: not stored" >&2
    status=1
    if [[ -n $snapshot ]]; then
        restic forget --quiet "$snapshot"
    fi
done
exit "$status"
