#!/bin/sh
# Once, before all else: certificates, and an empty disk of 64 MiB.
set -eu
[ ! -e /pki/ready ] || exit 0
nbdfleece pki init /pki --host server --host localhost
for name in guest backup auditor; do
    nbdfleece pki client /pki "$name"
done
truncate -s 64M /disks/vda.raw
touch /pki/ready
echo "pki: certificates for the server, guest, backup and auditor"
