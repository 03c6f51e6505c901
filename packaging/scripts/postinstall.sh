#!/bin/sh
# The group's members may use the root daemon as a service. Nothing is started: "doppel rootd install" does that.
set -e
getent group doppel >/dev/null || groupadd --system doppel
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	systemctl try-restart doppel-rootd.service # after an upgrade
fi
