#!/bin/sh
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload
case "$1" in
purge | 0) ! getent group doppel >/dev/null || groupdel doppel ;;
esac
