#!/bin/sh
# The database in /var/lib/doppel-relay goes when the package is purged (deb), and else stays.
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload
[ "$1" != purge ] || rm -rf /var/lib/doppel-relay /var/lib/private/doppel-relay
