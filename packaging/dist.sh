#!/bin/bash
# Makes what is released into dist/release: for each architecture tarballs, .deb and .rpm of doppel and of its relay, the relay's chart, and their
# checksums. The same commit gives the same bytes. Needs VERSION, LDFLAGS and NFPM (the program); usage: packaging/dist.sh ARCH...
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0 GOOS=linux VERSION
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
umask 022
out=dist/release
rm -rf "$out" && mkdir -p "$out"
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT

GOOS='' go run -trimpath -ldflags "$LDFLAGS" ./packaging/pages "$tmp/pages" # runs here, whatever is built

# pack DIRECTORY FILE NAME [TAR-OPTION...] makes a tarball in which the directory is called NAME.
pack() {
	chmod -R u=rwX,go=rX "$1" # whatever the checkout's umask was
	tar --create --sort=name --format=gnu --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
		--transform="s,^\.,$3," --directory "$1" "${@:4}" . | gzip -9n >"$out/$2"
}

for chart in doppel doppel-relay; do
	cp -r "charts/$chart" "$tmp/$chart"
	sed -i "s/^\(version\|appVersion\): .*/\1: $VERSION/" "$tmp/$chart/Chart.yaml"
	pack "$tmp/$chart" "$chart-$VERSION.tgz" "$chart" --exclude=./embed.go # as helm package makes it
done

for arch in "$@"; do
	export ARCH=$arch ROOT=$tmp/$arch
	mkdir -p "$ROOT"/{bin,systemd,man1,man8,doc,completions} "$ROOT"/relay/{bin,systemd,man8,doc,etc}
	for p in doppel doppel-helm doppel-rootd; do
		GOARCH=$arch go build -trimpath -ldflags "$LDFLAGS" -o "$ROOT/bin/$p" ./cmd/$p
	done
	sed 's#@PROGRAM@#/usr/bin/doppel-rootd#' internal/spawn/doppel-rootd.service >"$ROOT/systemd/doppel-rootd.service"
	cp "$tmp"/pages/man/*.1 "$ROOT/man1" && cp packaging/doppel-{helm,rootd}.8 "$ROOT/man8"
	cp "$tmp"/pages/{doppel.bash,_doppel,doppel.fish} "$ROOT/completions"
	cp README.md CHANGELOG.md "$ROOT/doc" && cp LICENSE "$ROOT/doc/copyright"

	GOARCH=$arch go build -trimpath -ldflags "$LDFLAGS" -o "$ROOT/relay/bin/doppel-relay" ./cmd/doppel-relay
	cp packaging/doppel-relay.service "$ROOT/relay/systemd" && cp packaging/doppel-relay.8 "$ROOT/relay/man8" && cp packaging/relay.env "$ROOT/relay/etc"
	cp docs/relay.md "$ROOT/relay/doc" && cp LICENSE "$ROOT/relay/doc/copyright"

	pack "$ROOT" "doppel-$VERSION-linux-$arch.tar.gz" "doppel-$VERSION-linux-$arch" --exclude=./systemd --exclude=./relay
	pack "$ROOT/relay" "doppel-relay-$VERSION-linux-$arch.tar.gz" "doppel-relay-$VERSION-linux-$arch"

	gzip -9n "$ROOT"/man?/* "$ROOT"/relay/man8/* "$ROOT/doc/CHANGELOG.md"
	find "$ROOT" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
	for packager in deb rpm; do
		for config in nfpm nfpm-relay; do
			"$NFPM" package --config packaging/$config.yaml --packager $packager --target "$out/" >/dev/null
		done
	done
done
cd "$out" && sha256sum -- * >"$tmp/sums" && mv "$tmp/sums" SHA256SUMS
ls -l
