package sandbox

import (
	"errors"
	"io/fs"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func TestRefusal(t *testing.T) {
	cause := errors.New("operation not permitted")
	for name, tt := range map[string]struct {
		f    facts
		hint string
	}{
		"Debian":    {facts{clone: "0", max: "1000"}, "kernel.unprivileged_userns_clone=1"},
		"none left": {facts{max: "0"}, "user.max_user_namespaces=15000"},
		"Ubuntu":    {facts{max: "1000", appArmor: "1"}, "apparmor_restrict_unprivileged_userns=0"},
		"container": {facts{clone: "1", max: "1000", appArmor: "0"}, "in a container"},
	} {
		e := uerr.From(refusal(tt.f, cause))
		if e.Kind != uerr.Denied || !strings.Contains(e.Hint, tt.hint) || !strings.Contains(e.Msg, "user namespace") {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func TestWhere(t *testing.T) {
	dns := netip.MustParseAddrPort("127.0.0.1:5300")
	for dst, want := range map[string]string{
		"198.18.0.2:53":        "127.0.0.1:5300", // the resolver
		"198.18.0.2:80":        "",
		"198.18.0.3:8080":      "127.0.0.1:8080", // the machine
		"198.18.0.4:80":        "",
		"198.18.0.8:80":        "198.18.0.8:80",
		"203.0.113.10:443":     "203.0.113.10:443",
		"10.0.0.1:53":          "10.0.0.1:53",
		"169.254.169.254:80":   "169.254.169.254:80",
		"224.0.0.251:5353":     "",
		"255.255.255.255:67":   "",
		"0.0.0.0:80":           "",
		"127.0.0.1:80":         "",
		"[2001:db8::1]:80":     "[2001:db8::1]:80",
		"[::1]:80":             "",
		"[::ffff:10.0.0.1]:80": "10.0.0.1:80",
	} {
		got := where(netip.MustParseAddrPort(dst), dns)
		if want == "" && !got.IsValid() {
			continue
		}
		if got.String() != want {
			t.Errorf("%s leads to %v, want %q", dst, got, want)
		}
	}
}

func TestFiles(t *testing.T) {
	if got := nameserverConf([]string{"corp.example", "lan"}); !strings.HasSuffix(got, "\nnameserver 198.18.0.2\nsearch corp.example lan\n") {
		t.Errorf("resolv.conf: %q", got)
	}
	if got := nameserverConf(nil); strings.Contains(got, "search") {
		t.Errorf("resolv.conf: %q", got)
	}
	for in, want := range map[string]string{
		"":                    "198.18.0.3 host.doppel.internal\n",
		"127.0.0.1 localhost": "127.0.0.1 localhost\n198.18.0.3 host.doppel.internal\n",
	} {
		if got := hostsFile(in); got != want {
			t.Errorf("hosts: %q", got)
		}
	}
}

// TestRefused: a machine that gives no user namespaces says so in several ways.
func TestRefused(t *testing.T) {
	for errno, want := range map[syscall.Errno]bool{
		syscall.EPERM: true, syscall.EACCES: true, syscall.ENOSPC: true, syscall.EUSERS: true, syscall.EINVAL: true, syscall.ENOSYS: true,
		syscall.ENOENT: false, syscall.ENOMEM: false,
	} {
		if got := Refused(&fs.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: errno}); got != want {
			t.Errorf("%v: %v", errno, got)
		}
	}
}
