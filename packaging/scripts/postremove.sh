#!/bin/sh
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload
rmdir --ignore-fail-on-non-empty /run/doppel 2>/dev/null || : # the service leaves it for root daemons that were started through sudo
case "$1" in
purge | 0) ! getent group doppel >/dev/null || groupdel doppel ;;
esac
