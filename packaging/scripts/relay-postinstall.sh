#!/bin/sh
# Nothing is started: it has to be told its domain first, in /etc/doppel-relay/relay.env.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	systemctl try-restart doppel-relay.service # after an upgrade
fi
