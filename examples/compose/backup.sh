#!/bin/sh
# Takes the disk's point in time again and again while the guest writes, and proves what it got.
set -eu
: "${SERVER:=server}" "${PKI:=/pki}" "${SHARED:=/shared}" "${DEMO:=/demo}" "${BACKUP:=/backup}"
: "${PYTHON:=/usr/bin/python3}" "${PAUSE:=2}"
at="nbds://$SERVER"

say() { echo "backup: $*"; }
acknowledged() { cat "$SHARED/progress"; }
uri() { echo "$at/$1?tls-certificates=$PKI/clients/$2"; }

# $1: how it is copied. The instant lies between two looks at what the guest has been told.
snapshot() {
    low=$(acknowledged)
    nbdfleece snapshot create vda --name "$1" >/dev/null
    high=$(acknowledged)
    say "snapshot vda@$1 taken; the guest had written $low to $high records, and goes on"
}
prove() {
    sleep 1    # a slow reader: by now the guest has overwritten part of what is read
    told=$("$PYTHON" "$DEMO/records.py" verify "$SHARED/copy.raw" "$low" "$high") \
        || { say "FAILED by $1: $told"; exit 1; }
    say "by $1: $told"
    now=$(acknowledged)
    say "meanwhile the guest wrote $((now - high)) more records"
    rm -f "$SHARED/copy.raw"
    nbdfleece snapshot delete "vda@$1"
}

rm -f "$SHARED/done" "$SHARED/copy.raw"
until nbdfleece health --quiet 2>/dev/null && [ -s "$SHARED/progress" ]; do sleep 0.2; done
sleep "$PAUSE"

if nbdinfo --size "$(uri vda backup)" >/dev/null 2>&1; then
    say "FAILED: the policy let the backup open the live disk"; exit 1
fi
say "PROVED: the policy keeps the backup from the live disk"
if nbdinfo --size "nbd://$SERVER/vda" >/dev/null 2>&1; then
    say "FAILED: somebody without a certificate opened the disk"; exit 1
fi
say "PROVED: without TLS nobody opens anything"

snapshot nbdcopy
nbdcopy "$(uri vda@nbdcopy backup)" "$SHARED/copy.raw"
prove nbdcopy

sleep "$PAUSE"
snapshot qemu-img
qemu-img convert --object "tls-creds-x509,id=t,endpoint=client,dir=$PKI/clients/backup" \
    --image-opts "driver=nbd,host=$SERVER,port=10809,export=vda@qemu-img,tls-creds=t" \
    -O raw "$SHARED/copy.raw"
prove qemu-img

# For comparison: what every backup without a snapshot is.
nbdcopy --connections=1 --requests=1 "$(uri vda auditor)" "$SHARED/copy.raw"
told=$("$PYTHON" "$DEMO/records.py" verify "$SHARED/copy.raw") || true
say "a plain copy of the live disk: $told"
rm -f "$SHARED/copy.raw"

for round in 1 2 3; do
    sleep "$PAUSE"
    low=$(acknowledged)
    nbdfleece backup create vda --to "$BACKUP" >/dev/null
    say "backup $round of 3 is done; the guest had written $low records when it began"
    echo "$low $(acknowledged)" >>"$SHARED/bounds"
done
nbdfleece backup list "$BACKUP"
touch "$SHARED/done"
