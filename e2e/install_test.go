package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// as is the same laptop with another user at it.
func (l *laptop) user(uid string) *laptop {
	return &laptop{c: l.c, name: l.name, as: []string{"--user", uid}}
}

// tunFile gives the laptop a device file of that mode, whatever the machine's own is: 0666 as udev does on a normal Linux, or root's alone.
func (l *laptop) tunFile(t *testing.T, mode string) {
	t.Helper()
	file := "/run/dev/tun-" + mode
	l.sh(t, fmt.Sprintf("mkdir -p /run/dev; mknod -m %s %s c 10 200; mount --bind %[2]s /dev/net/tun", mode, file))
}

// TestPrivilege is every way to the root daemon: none of the user's own programs ever has a privilege.
func TestPrivilege(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "priv")
	c.sample(t, ns)
	l := newLaptop(t, "owner")
	l.withManager(t)
	color := func(t *testing.T, l *laptop) {
		t.Helper()
		want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice."+ns+":3000/color"), "green")
	}
	dev := l.user("1000")
	home := strings.TrimSpace(dev.sh(t, "echo $HOME"))

	t.Run("user daemon as nobody", func(t *testing.T) {
		nobody := l.user("65534")
		stop := l.start(t, "doppel-rootd", "--socket", "/run/doppel/rootd-65534.sock", "--uid", "65534")
		eventually(t, 5*time.Second, func() error { return l.exists(t, "/run/doppel/rootd-65534.sock") })
		nobody.run(t, "doppel", "connect", "-n", ns)
		color(t, nobody)
		status := l.sh(t, "cat /proc/$(pgrep -f '[d]oppel daemon')/status")
		want(t, status, "\nUid:\t65534\t65534\t65534\t65534\n", "\nGid:\t65534\t65534\t65534\t65534\n", "\nCapPrm:\t0000000000000000\n", "\nCapEff:\t0000000000000000\n", "\nCapAmb:\t0000000000000000\n")
		if r := dev.try(t, "env", "DOPPEL_ROOT_SOCKET=/run/doppel/rootd-65534.sock", "doppel", "connect", "-n", ns); r.code == 0 {
			t.Errorf("another user's root daemon: %v", r)
		}
		nobody.run(t, "doppel", "quit", "-s")
		stop()
	})

	t.Run("a password", func(t *testing.T) {
		l.sh(t, `echo 'dev ALL=(ALL:ALL) ALL' >/etc/sudoers.d/dev; echo dev:open-sesame | chpasswd`)
		r := dev.try(t, "doppel", "connect", "-n", ns)
		if r.code != 3 {
			t.Errorf("without a terminal: %v", r)
		}
		want(t, r.stderr, "doppel: error: sudo needs a password", "doppel: hint: run doppel connect in a terminal")
		term := dev.terminal(t, "doppel", "connect", "-n", ns)
		term.expect("doppel needs root to create a network device")
		term.expect("password for dev:")
		if strings.Index(term.text(), "doppel needs root") > strings.Index(term.text(), "password for") {
			t.Errorf("the reason comes after the question:\n%s", term.text())
		}
		term.send("open-sesame\n")
		if err := term.wait(); err != nil {
			t.Fatalf("%v:\n%s", err, term.text())
		}
		color(t, dev)
		dev.run(t, "doppel", "quit", "-s")
		l.sh(t, "rm /etc/sudoers.d/dev")
	})

	// There is no systemd here that would run the unit. What it does is done by hand: the same command line with the same capabilities,
	// group and directory. The unit itself is judged by systemd-analyze in internal/spawn.
	t.Run("as a service", func(t *testing.T) {
		l.sh(t, "groupadd --system doppel; usermod --append --groups doppel dev; mkdir -p /run/systemd/system /etc/systemd/system/multi-user.target.wants; touch /etc/systemd/system/multi-user.target.wants/doppel-rootd.service")
		stop := l.startUnit(t, filepath.Join(c.root, "internal/spawn/doppel-rootd.service"), c.bin("doppel-rootd"))
		member := func(t *testing.T, args ...string) result { // a login that has the groups of /etc/group
			t.Helper()
			return l.try(t, append([]string{
				"env", "HOME=" + home, "KUBECONFIG=" + home + "/.kube/config", "XDG_RUNTIME_DIR=/run/user/1000",
				"setpriv", "--reuid", "1000", "--regid", "1000", "--init-groups", "--inh-caps", "-all",
			}, args...)...)
		}
		if r := member(t, "doppel", "connect", "-n", ns); r.code != 0 { // sudo has no rule any more: nobody can have been asked
			t.Fatalf("connect: %v", r)
		}
		color(t, dev)
		want(t, member(t, "doppel", "rootd", "status").stdout, "Group   : you may use the service")
		want(t, member(t, "doppel", "status").stdout, "the system's service")

		stop() // as kill -9 by somebody, and Restart=always
		stop = l.startUnit(t, filepath.Join(c.root, "internal/spawn/doppel-rootd.service"), c.bin("doppel-rootd"))
		eventually(t, 10*time.Second, func() error {
			if r := l.try(t, "curl", "-s", "-m", "2", "dataprocessingservice."+ns+":3000/color"); r.code != 0 {
				return fmt.Errorf("a cluster name: %v", r)
			}
			return nil
		})
		if r := member(t, "doppel", "quit", "-s"); r.code != 0 {
			t.Fatalf("quit -s: %v", r)
		}
		want(t, member(t, "doppel", "status").stdout, "User daemon: not running", "the system's service")
		r := dev.try(t, "doppel", "rootd", "status") // whose login is from before
		want(t, r.stdout, "Daemon  : not for you: ", "Group   : you are in the group doppel; log in again for that to count")
		stop()
	})
}

func (l *laptop) exists(t *testing.T, path string) error {
	t.Helper()
	if r := l.try(t, "test", "-e", path); r.code != 0 {
		return fmt.Errorf("%s is not there", path)
	}
	return nil
}

// startUnit runs a unit's ExecStart with the capabilities, group and runtime directory that the unit gives it. stop kills it.
func (l *laptop) startUnit(t *testing.T, unit, program string) (stop func()) {
	t.Helper()
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	value := func(key string) string {
		m := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindStringSubmatch(string(b))
		if m == nil {
			t.Fatalf("%s has no %s", unit, key)
		}
		return m[1]
	}
	caps := ""
	for _, c := range strings.Fields(value("CapabilityBoundingSet")) {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	dir := "/run/" + value("RuntimeDirectory")
	argv := strings.Fields(strings.ReplaceAll(value("ExecStart"), "@PROGRAM@", program))
	l.sh(t, fmt.Sprintf("mkdir -p -m 0755 %s; chgrp %s %s", dir, value("Group"), dir))
	ended := l.start(t, append([]string{
		"setpriv", "--no-new-privs", "--inh-caps", "-all", "--bounding-set", "-all" + caps, "--regid", value("Group"), "--clear-groups", "--",
	}, argv...)...)
	socket := dir + "/rootd.sock"
	eventually(t, 5*time.Second, func() error {
		if out := l.sh(t, "stat -c '%A %U:%G' "+socket+" 2>/dev/null; true"); out != "srw-rw---- root:doppel\n" {
			return fmt.Errorf("socket: %q", out)
		}
		return nil
	})
	status := l.sh(t, "cat /proc/$(pgrep -f '[d]oppel-rootd --service')/status")
	want(t, status, "\nCapPrm:\t0000000000001000\n", "\nCapBnd:\t0000000000001000\n") // CAP_NET_ADMIN alone
	return func() {
		l.sh(t, "kill -9 $(pgrep -f '[d]oppel-rootd --service')")
		ended()
	}
}

// TestRun is doppel run for a user without any right on the laptop.
func TestRun(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "run")
	c.sample(t, ns)
	l := newLaptop(t, "guest")
	l.withManager(t)
	l.sh(t, "rm /etc/sudoers.d/dev")
	dev := l.user("1000")
	in := func(args ...string) []string { return append([]string{"doppel", "run", "-n", ns, "--"}, args...) }

	l.tunFile(t, "0600")
	r := dev.try(t, in("true")...)
	if r.code != 3 || !strings.Contains(r.stderr, "/dev/net/tun: permission denied") || !strings.Contains(r.stderr, "hint: give users the device file") {
		t.Errorf("a device file that is root's alone: %v", r)
	}
	l.tunFile(t, "0666")
	r = dev.try(t, "unshare", "-Ur", "sh", "-c", "echo 0 >/proc/sys/user/max_user_namespaces; doppel run -- true")
	if r.code != 3 || !strings.Contains(r.stderr, "hint: allow them with: sudo sysctl -w user.max_user_namespaces") {
		t.Errorf("user namespaces that are forbidden: %v", r)
	}
	before := l.state(t)
	if r := dev.try(t, in("curl", "-s", "-m", "5", "dataprocessingservice:3000/color")...); r.code != 0 || r.stdout != "\"green\"\n" && r.stdout != `"green"` {
		t.Fatalf("a service by its bare name: %v", r)
	}

	t.Run("group", func(t *testing.T) { // ends when its members have
		t.Run("names and addresses", func(t *testing.T) {
			t.Parallel()
			l.colors(t, "blue", "127.0.0.1:3999")
			svc := c.clusterIP(t, ns, "dataprocessingservice")
			out := dev.run(t, in("sh", "-c", `
				curl -s -m 5 `+svc+`/color; echo " = address"
				curl -s -m 5 dataprocessingservice.`+ns+`.svc.cluster.local:3000/color; echo " = full name"
				`+c.bin("colors")+` -addr 127.0.0.1:3998 verylargejavaservice 2>/dev/null & pid=$!
				curl -s -m 5 --retry 20 --retry-connrefused --retry-delay 1 127.0.0.1:3998/color; echo " = static program"
				kill $pid
				curl -s -m 5 -o /dev/null -w %{http_code} http://example.com; echo " = outside"
				curl -s -m 5 host.doppel.internal:3999/color; echo " = the machine"
				curl -s -m 5 localhost:3999; echo "$? = localhost"
				curl -s -m 5 198.18.0.4; echo "$? = nowhere"
				dig +short dataprocessingservice; dig +tcp +short example.com`)...)
			out = strings.ReplaceAll(out, "\n =", " =") // the sample ends its answers with a line's end
			want(t, out, `"green" = address`, `"green" = full name`, `"green" = static program`, "200 = outside", `"blue" = the machine`, "7 = localhost", "7 = nowhere", strings.Split(svc, ":")[0], "203.0.113.10")
		})
		t.Run("who and how", func(t *testing.T) {
			t.Parallel()
			out := dev.run(t, in("sh", "-c", "id -u; id -g; grep -e CapPrm -e CapAmb /proc/self/status; cat; echo oops >&2")...)
			if out != "1000\n1000\nCapPrm:\t0000000000000000\nCapAmb:\t0000000000000000\n" {
				t.Errorf("inside: %s", out)
			}
			if r := dev.try(t, in("sh", "-c", "exit 42")...); r.code != 42 {
				t.Errorf("exit code: %v", r)
			}
			if r := dev.try(t, in("sh", "-c", "kill -TERM $$")...); r.code != 143 {
				t.Errorf("a signal: %v", r)
			}
			term := dev.terminal(t, in("sh", "-c", `test -t 0 && trap 'echo interrupted; exit 7' INT && echo ready && while :; do sleep 0.1; done`)...)
			term.expect("ready")
			term.send("\x03")
			term.expect("interrupted")
			if err := term.wait(); err == nil || err.Error() != "exit status 7" {
				t.Errorf("%v:\n%s", err, term.text())
			}
		})
		t.Run("two at once", func(t *testing.T) {
			t.Parallel()
			other := []string{"doppel", "run", "-n", "default", "--", "sh", "-c", "dig +short kubernetes; dig +short dataprocessingservice; echo END; sleep 1; dig +short kubernetes"}
			done := make(chan string, 1)
			go func() {
				out, err := dev.command(t.Context(), other...).Output()
				done <- fmt.Sprintf("%s%v", out, err)
			}()
			if got, want := dev.run(t, in("dig", "+short", "dataprocessingservice")...), strings.Split(c.clusterIP(t, ns, "dataprocessingservice"), ":")[0]+"\n"; got != want {
				t.Errorf("in namespace %s: %q, want %q", ns, got, want)
			}
			if got, want := <-done, "10.96.0.1\nEND\n10.96.0.1\n<nil>"; got != want {
				t.Errorf("in namespace default: %q, want %q", got, want)
			}
		})
		t.Run("killed", func(t *testing.T) {
			t.Parallel()
			stop := dev.start(t, in("sh", "-c", "exec sleep 987654")...)
			eventually(t, 20*time.Second, func() error { return l.pgrep(t, "^sleep 987654", true) })
			l.sh(t, "kill -9 $(pgrep -f '[d]oppel run .*sleep 987654')")
			eventually(t, 5*time.Second, func() error { return l.pgrep(t, "^sleep 987654", false) })
			stop()
		})
	})
	eventually(t, 10*time.Second, func() error {
		if after := l.state(t); after != before {
			return fmt.Errorf("the laptop is not as before:\n%s\nbut:\n%s", before, after)
		}
		return nil
	})
}

// pgrep is nil if a process of that command line runs, or does not.
func (l *laptop) pgrep(t *testing.T, pattern string, runs bool) error {
	t.Helper()
	if r := l.try(t, "pgrep", "-f", pattern); (r.code == 0) != runs {
		return fmt.Errorf("%s: %v", pattern, r)
	}
	return nil
}
