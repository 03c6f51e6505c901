#!/bin/sh
# $1 is "remove" (deb) or 0 (rpm) unless it is an upgrade.
set -e
case "$1" in
remove | 0) [ ! -d /run/systemd/system ] || systemctl disable --now doppel-relay.service ;;
esac
