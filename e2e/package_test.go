package e2e

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestPackage installs the .deb on a Debian and connects with what it brought. The Debian is this machine's own, its package database
// included, under an overlay that is gone with the laptop: dpkg checks real dependencies and runs the package's scripts.
func TestPackage(t *testing.T) {
	c := theCluster(t)
	debs, err := filepath.Glob(filepath.Join(c.root, "dist/release/doppel_*_"+runtime.GOARCH+".deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("want one .deb in dist/release, for %s: make dist DIST_ARCH=%s: %v", runtime.GOARCH, runtime.GOARCH, debs)
	}
	if _, err := os.Stat("/etc/debian_version"); err != nil {
		t.Skip("the package is tested on Debian and its kin: this is another system")
	}
	relays, err := filepath.Glob(filepath.Join(c.root, "dist/release/doppel-relay_*_"+runtime.GOARCH+".deb"))
	if err != nil || len(relays) != 1 {
		t.Fatalf("want one .deb of the relay: %v", relays)
	}
	l := newLaptop(t, "debian")
	const root = "/run/deb/root"
	l.sh(t, `mkdir -p /run/deb/up /run/deb/work `+root+`
		mount -t overlay overlay -o lowerdir=/,upperdir=/run/deb/up,workdir=/run/deb/work `+root+`
		for d in proc sys dev etc tmp; do mount --rbind /$d `+root+`/$d; done
		rm -f `+root+`/var/lib/man-db/auto-update # or dpkg indexes all of the machine's manual, for minutes
		cp `+debs[0]+` `+root+`/var/cache/doppel.deb
		cp `+relays[0]+` `+root+`/var/cache/doppel-relay.deb
		mkdir -p `+root+`/run/user; mount --rbind /run/user `+root+`/run/user`)
	chroot := func(line string) string {
		t.Helper()
		return l.run(t, "chroot", root, "env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-ec", line)
	}
	chroot("dpkg --install /var/cache/doppel.deb")
	want(t, chroot("dpkg --status doppel"), "Status: install ok installed", "Depends: passwd")
	want(t, chroot("getent group doppel"), "doppel:")
	want(t, chroot("stat -c '%U:%G %a' /usr/bin/doppel /usr/bin/doppel-helm /usr/bin/doppel-rootd"), "root:root 755\nroot:root 755\nroot:root 755\n")
	want(t, chroot("grep ExecStart /usr/lib/systemd/system/doppel-rootd.service"), "ExecStart=/usr/bin/doppel-rootd --service\n")
	want(t, chroot("zcat /usr/share/man/man1/doppel-intercept.1.gz /usr/share/man/man8/doppel-rootd.8.gz"), ".SH NAME", "doppel-intercept", "doppel-rootd")
	want(t, chroot("bash -c '. /usr/share/bash-completion/completions/doppel && complete -p doppel'; doppel __complete conn"), "-F __start_doppel doppel", "connect")
	want(t, chroot("doppel rootd status"), "Unit    : /usr/lib/systemd/system/doppel-rootd.service, not started at boot")

	ns := c.namespace(t, "package")
	c.sample(t, ns)
	l.withManager(t)
	home := strings.TrimSpace(l.user("1000").sh(t, "echo $HOME"))
	dev := []string{
		"chroot", "--userspec=1000:1000", root, "env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + home, "KUBECONFIG=" + home + "/.kube/config", "XDG_RUNTIME_DIR=/run/user/1000",
	}
	r := l.try(t, append(dev, "doppel", "connect", "-n", ns)...)
	if r.code != 0 {
		t.Fatalf("connect: %v", r)
	}
	want(t, l.run(t, append(dev, "curl", "-s", "-m", "5", "dataprocessingservice."+ns+":3000/color")...), "green")
	want(t, l.sh(t, "readlink /proc/$(pgrep -f '[d]oppel daemon')/exe /proc/$(pgrep -x doppel-rootd)/exe"), "/usr/bin/doppel\n", "/usr/bin/doppel-rootd\n")
	l.run(t, append(dev, "doppel", "quit", "-s")...)

	// The relay's: a unit that is told what for in a file that root alone may read.
	chroot("dpkg --install /var/cache/doppel-relay.deb")
	want(t, chroot("stat -c '%U:%G %a' /etc/doppel-relay/relay.env /usr/bin/doppel-relay"), "root:root 600\nroot:root 755\n")
	want(t, chroot("grep ExecStart /usr/lib/systemd/system/doppel-relay.service"), "ExecStart=/usr/bin/doppel-relay -data")
	want(t, chroot("zcat /usr/share/man/man8/doppel-relay.8.gz; doppel-relay -version"), ".SH NAME", "doppel-relay 0.")
	chroot("mkdir -p /var/lib/private/doppel-relay; dpkg --purge doppel-relay; ! ls -d /etc/doppel-relay /var/lib/private/doppel-relay 2>/dev/null")

	chroot("dpkg --purge doppel")
	if left := chroot("ls -d /usr/bin/doppel* /usr/share/doc/doppel /usr/share/man/man?/doppel* /usr/lib/systemd/system/doppel* 2>/dev/null || true; getent group doppel || true"); left != "" {
		t.Errorf("left by dpkg --purge: %s", left)
	}
}
