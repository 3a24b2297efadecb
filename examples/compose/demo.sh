#!/bin/sh
# The demo, with docker or podman: builds, runs, shows what was proven. Exit code 0: all of it.
#
#     sh examples/compose/demo.sh
#
# ENGINE=podman COMPOSE=podman-compose chooses; BUILD=... adds options to the builds.
set -eu
cd "$(dirname "$0")"
if [ -z "${ENGINE:-}" ]; then
    if docker info >/dev/null 2>&1; then ENGINE=docker; else ENGINE=podman; fi
fi
if [ -z "${COMPOSE:-}" ]; then
    if [ "$ENGINE" = docker ]; then COMPOSE="docker compose"; else COMPOSE=podman-compose; fi
fi
BUILD=${BUILD:-}
[ "$ENGINE" = podman ] && BUILD="--format docker $BUILD"

# shellcheck disable=SC2086 - options are words
if [ -z "${NO_BUILD:-}" ]; then
    $ENGINE build $BUILD -t nbdfleece ../..
    $ENGINE build $BUILD -t nbdfleece-demo-tools .
fi
down() { $COMPOSE down -v >/dev/null 2>&1 || true; }
down
trap down EXIT
$COMPOSE up -d pki
$ENGINE wait nbdfleece-demo-pki >/dev/null
$COMPOSE up -d
result=$($ENGINE wait nbdfleece-demo-backup)
[ "$result" != 0 ] || result=$($ENGINE wait nbdfleece-demo-restore-check)
for name in pki guest backup restore-check; do $ENGINE logs "nbdfleece-demo-$name"; done
# What is proven counts, not what says that it ended well.
if ! $ENGINE logs nbdfleece-demo-restore-check 2>&1 | grep -q "ALL PROVED"; then
    $ENGINE logs nbdfleece-demo-server
    echo "demo: FAILED" >&2
    [ "$result" != 0 ] || result=1
fi
exit "$result"
