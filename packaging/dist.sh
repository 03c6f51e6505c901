#!/bin/bash
# Makes what is released into dist/release: for each architecture a tarball, a .deb and an .rpm, and their checksums. The same commit gives
# the same bytes. Needs VERSION, LDFLAGS and NFPM (the program); usage: packaging/dist.sh ARCH...
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0 GOOS=linux VERSION
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
umask 022
out=dist/release
rm -rf "$out" && mkdir -p "$out"
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT

GOOS='' go run -trimpath ./packaging/pages "$tmp/pages" # runs here, whatever is built

for arch in "$@"; do
	export ARCH=$arch ROOT=$tmp/$arch
	mkdir -p "$ROOT"/{bin,systemd,man1,man8,doc,completions}
	for p in doppel doppel-rootd; do
		GOARCH=$arch go build -trimpath -ldflags "$LDFLAGS" -o "$ROOT/bin/$p" ./cmd/$p
	done
	sed 's#@PROGRAM@#/usr/bin/doppel-rootd#' internal/spawn/doppel-rootd.service >"$ROOT/systemd/doppel-rootd.service"
	cp "$tmp"/pages/man/*.1 "$ROOT/man1" && cp packaging/doppel-rootd.8 "$ROOT/man8"
	cp "$tmp"/pages/{doppel.bash,_doppel,doppel.fish} "$ROOT/completions"
	cp README.md CHANGELOG.md "$ROOT/doc" && cp LICENSE "$ROOT/doc/copyright"

	name=doppel-$VERSION-linux-$arch
	tar --create --sort=name --format=gnu --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
		--transform="s,^\.,$name," --directory "$ROOT" --exclude=./systemd . | gzip -9n >"$out/$name.tar.gz"

	gzip -9n "$ROOT"/man?/* "$ROOT/doc/CHANGELOG.md"
	find "$ROOT" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
	for packager in deb rpm; do
		"$NFPM" package --config packaging/nfpm.yaml --packager $packager --target "$out/" >/dev/null
	done
done
cd "$out" && sha256sum -- * >"$tmp/sums" && mv "$tmp/sums" SHA256SUMS
ls -l
