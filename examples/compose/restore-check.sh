#!/bin/sh
# Restores every backup when the last is made, and proves that each is one instant.
set -eu
: "${SHARED:=/shared}" "${DEMO:=/demo}" "${BACKUP:=/backup}" "${PYTHON:=/usr/bin/python3}"
until [ -e "$SHARED/done" ]; do sleep 0.2; done

say() { echo "restore-check: $*"; }
rm -f "$SHARED/restored.raw" "$SHARED/chain.raw"
count=0
exec 3<"$SHARED/bounds"
for image in "$BACKUP"/vda/*.qcow2; do
    name=${image##*/}
    instant=${name%%.*}
    read -r low high <&3
    nbdfleece restore "$BACKUP/vda@$instant" "$SHARED/restored.raw" --force >/dev/null
    told=$("$PYTHON" "$DEMO/records.py" verify "$SHARED/restored.raw" "$low" "$high") \
        || { say "FAILED: $name: $told"; exit 1; }
    say "$name: $told"
    # Without nbdfleece: the files are plain qcow2, each on top of the last.
    qemu-img convert -O raw "$image" "$SHARED/chain.raw"
    cmp "$SHARED/restored.raw" "$SHARED/chain.raw"
    count=$((count + 1))
done
say "PROVED: qemu-img reads the same from the files, without nbdfleece"
if [ "$count" -ne 3 ]; then say "FAILED: $count backups, not 3"; exit 1; fi
nbdfleece backup verify "$BACKUP" --data
say "ALL PROVED: $count backups of a disk in use, each exactly one instant, all restored"
