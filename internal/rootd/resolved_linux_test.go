package rootd

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/rootapi"
)

// bus lets everybody do everything: it is the test's own.
const bus = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_destination="*"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
</policy></busconfig>`

// resolvedPrograms finds systemd-resolved and resolvectl: the machine's own, or those that make deps unpacked without installing them.
func resolvedPrograms(t *testing.T) (dir string) {
	t.Helper()
	unpacked, err := filepath.Abs("../../bin/tools/resolved")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/", unpacked} {
		if _, err := os.Stat(filepath.Join(dir, "lib/systemd/systemd-resolved")); err == nil {
			if _, err := exec.LookPath("dbus-daemon"); err != nil {
				t.Skip("dbus-daemon is missing: run make deps")
			}
			return dir
		}
	}
	t.Skip("systemd-resolved is missing: run make deps")
	return ""
}

// startResolved runs the real systemd-resolved on a bus of its own, with 10.9.9.9 as the server of eth0 for all names.
func startResolved(t *testing.T) {
	t.Helper()
	dir := resolvedPrograms(t)
	nettest.Cover(t, "/etc")
	nettest.Cover(t, "/run")
	joinRouter(t, "1")
	for path, text := range map[string]string{
		"/etc/passwd":        "root:x:0:0::/:/bin/sh\nsystemd-resolve:x:991:991::/:/bin/false\n",
		"/etc/group":         "root:x:0:\nsystemd-resolve:x:991:\n",
		"/etc/nsswitch.conf": "hosts: resolve [!UNAVAIL=return] dns\n",
		"/run/bus.conf":      bus,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"/run/dbus", "/run/systemd/resolve"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown("/run/systemd/resolve", 991, 991); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"usr/lib/*-linux-gnu", "usr/lib/*-linux-gnu/systemd"} {
		libs, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("LD_LIBRARY_PATH", strings.Join(append(libs, os.Getenv("LD_LIBRARY_PATH")), ":"))
	}
	background(t, "dbus-daemon", "--config-file=/run/bus.conf", "--nofork", "--nopidfile", "--nosyslog")
	nettest.Poll(t, 5*time.Second, "the bus listens", func() bool {
		_, err := os.Stat("/run/dbus/system_bus_socket")
		return err == nil
	})
	background(t, filepath.Join(dir, "lib/systemd/systemd-resolved"))
	nettest.Poll(t, 10*time.Second, "systemd-resolved takes a server for eth0", func() bool {
		return resolvectl(dir, "dns", "eth0", "10.9.9.9") == nil && resolvectl(dir, "domain", "eth0", "~.") == nil
	})
	nettest.Poll(t, 5*time.Second, "systemd-resolved answers", func() bool { return askStub("web.shop.") == "resolver" })
}

func background(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func resolvectl(dir string, args ...string) error {
	out, err := exec.Command(filepath.Join(dir, "usr/bin/resolvectl"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("resolvectl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// askStub asks as a program that reads resolv.conf does; the names are never twice the same, so that no cache answers.
func askStub(name string) string {
	c, err := net.DialTimeout("udp", "127.0.0.53:53", time.Second)
	if err != nil {
		return err.Error()
	}
	return query(c, name)
}

// getent looks a name up through the C library with nss-resolve, which talks to systemd-resolved directly and not over DNS.
func getent(name string) string {
	out, err := exec.Command("getent", "ahostsv4", name).Output()
	if err != nil {
		return err.Error()
	}
	addr, _, _ := strings.Cut(string(out), " ")
	for who, a := range whoAddrs {
		if a == addr {
			return who
		}
	}
	return addr
}

// TestResolved has the real systemd-resolved send the cluster's domains behind the device.
func TestResolved(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	startResolved(t)
	rd := startRootd(t)
	u, n := startUser(t)
	n.DNS.Server = netip.MustParseAddr(vifDNS)
	n.DNS.Domains = []string{"search.doppel.internal", "~cluster.local", "~svc", "~web.shop"}
	st := u.do(command{Do: "set", Network: n}).State
	if st.DNSMode != rootapi.DNSResolved || len(st.Resolvers) != 1 || st.Resolvers[0].Addr().String() != "10.9.9.9" {
		t.Fatalf("state %+v", st)
	}
	u.do(command{Do: "stack", Arg: n.DNS.Listen.String()})
	cluster := []string{"web.shop.", "a.b.svc.", "x.svc.cluster.local."}
	outside := []string{"example.com.", "www.shop.", "web.shop.example.com."}
	check := func(when, forCluster string) {
		t.Helper()
		nettest.Poll(t, 5*time.Second, when+": web.shop answered by "+forCluster, func() bool { return askStub("web.shop.") == forCluster })
		for _, name := range cluster {
			if got := askStub(name); got != forCluster {
				t.Errorf("%s: %s answered by %q, want %q", when, name, got, forCluster)
			}
		}
		for _, name := range outside {
			if got := askStub(name); got != "resolver" {
				t.Errorf("%s: %s answered by %q", when, name, got)
			}
		}
	}
	check("set", "doppel")
	for name, want := range map[string]string{"web.shop": "doppel", "web": "doppel", "example.com": "resolver"} {
		if got := getent(name); got != want {
			t.Errorf("through nss-resolve %s is answered by %q, want %q", name, got, want)
		}
	}
	if m := look(t); m.table {
		t.Error("an nftables table beside systemd-resolved")
	}

	t.Run("domains change", func(t *testing.T) {
		c := n
		d := *n.DNS
		d.Domains = append([]string{"~www.shop"}, d.Domains...)
		c.DNS = &d
		u.do(command{Do: "set", Network: c})
		nettest.Poll(t, 5*time.Second, "the new domain", func() bool { return askStub("www.shop.") == "doppel" })
		u.do(command{Do: "set", Network: n})
		check("set back", "doppel")
	})
	t.Run("user daemon hangs", func(t *testing.T) {
		u.kill(syscall.SIGSTOP)
		for _, name := range outside {
			if got := askStub(name); got != "resolver" { // at once
				t.Errorf("%s answered by %q", name, got)
			}
		}
		check("hangs", "resolver")
		u.kill(syscall.SIGCONT)
		check("goes on", "doppel")
	})
	t.Run("it does not ask", func(t *testing.T) {
		c := n
		d := *n.DNS
		d.ResolvedFails = true
		c.DNS = &d
		if st := u.do(command{Do: "set", Network: c}).State; st.DNSMode != rootapi.DNSNftables || !strings.Contains(st.DNSReason, "systemd-resolved") {
			t.Errorf("state %+v", st)
		} else if stub := netip.MustParseAddrPort("127.0.0.53:53"); !slices.Equal(st.Resolvers, []netip.AddrPort{stub}) {
			t.Errorf("given up, outside names go to %v", st.Resolvers)
		}
		for _, name := range cluster { // all names come to the user daemon this way, which passes the others on
			if got := askStub(name); got != "doppel" {
				t.Errorf("without it: %s answered by %q", name, got)
			}
		}
		u.do(command{Do: "set", Network: n})
		check("with it again", "doppel")
	})
	t.Run("zero removes", func(t *testing.T) {
		u.do(command{Do: "set"})
		check("removed", "resolver")
		if st := u.do(command{Do: "set", Network: n}).State; st.DNSMode != rootapi.DNSResolved {
			t.Errorf("state %+v", st)
		}
		u.do(command{Do: "stack", Arg: n.DNS.Listen.String()})
		check("set again", "doppel")
	})
	rd.kill(syscall.SIGKILL)
	u.kill(syscall.SIGKILL)
	check("killed", "resolver")
	if b, err := os.ReadFile("/etc/resolv.conf"); err != nil || strings.Contains(string(b), "doppel") {
		t.Errorf("resolv.conf: %v\n%s", err, b)
	}
}

// TestResolvedHangs has a bus that does not answer: connecting goes on with the next way.
func TestResolvedHangs(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	nettest.Cover(t, "/etc")
	nettest.Cover(t, "/run")
	serveDNS("127.0.0.53:53", "resolver")
	writeResolvConf(t, "nameserver 127.0.0.53\n")
	if err := os.Mkdir("/run/dbus", 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", "/run/dbus/system_bus_socket") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	startRootd(t)
	u, n := startUser(t)
	n.DNS.Server = netip.MustParseAddr(vifDNS)
	st := u.do(command{Do: "set", Network: n}).State
	if st.DNSMode != rootapi.DNSNftables || !strings.Contains(st.DNSReason, "D-Bus") {
		t.Errorf("state %+v", st)
	}
	if got := askStub("web.shop."); got != "doppel" {
		t.Errorf("answered by %q", got)
	}
}
