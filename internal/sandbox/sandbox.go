// Package sandbox owns the namespaces of doppel run: a user, network and mount namespace in which one command, without any privilege on the
// machine, has a network device and a resolver of its own.
package sandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"strings"
	"syscall"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// Addresses inside, all from the range for benchmarks (RFC 2544), which no network routes.
var (
	// Nameserver answers DNS inside.
	Nameserver = netip.MustParseAddr("198.18.0.2")
	// Host leads to the machine's own loopback address, under HostName.
	Host = netip.MustParseAddr("198.18.0.3")
)

// HostName is Host's name inside.
const HostName = "host.doppel.internal"

// Config is what a Box is made from.
type Config struct {
	// Argv is the command, Env its whole environment.
	Argv, Env []string
	// Helper are the arguments by which this program runs Become.
	Helper         []string
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// ResolvConf names the machine's resolvers; default /etc/resolv.conf.
	ResolvConf string
	// Log; default: none.
	Log *slog.Logger
}

// facts are the settings of a Linux that may forbid user namespaces; "" where it has none of that name.
type facts struct {
	clone    string // kernel.unprivileged_userns_clone (Debian, and others with its patch)
	max      string // user.max_user_namespaces
	appArmor string // kernel.apparmor_restrict_unprivileged_userns (Ubuntu 23.10 and later)
}

// Refused reports whether a program could not be started because this machine gives no user namespaces: to nobody (clone(2) has ENOSPC for
// user.max_user_namespaces=0, EINVAL and ENOSYS for a kernel without them), or not to this user.
func Refused(err error) bool {
	for _, no := range []error{fs.ErrPermission, syscall.ENOSPC, syscall.EUSERS, syscall.EINVAL, syscall.ENOSYS} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

// refusal says why namespaces could not be made, and what allows them.
func refusal(f facts, err error) error {
	hint := "something forbids user namespaces to you: in a container, its seccomp profile or missing nesting; or use: doppel connect"
	switch {
	case f.clone == "0":
		hint = "allow them with: sudo sysctl -w kernel.unprivileged_userns_clone=1 (to keep it, put the setting into /etc/sysctl.d)"
	case f.max == "0":
		hint = "allow them with: sudo sysctl -w user.max_user_namespaces=15000 (to keep it, put the setting into /etc/sysctl.d)"
	case f.appArmor == "1":
		hint = "AppArmor allows them to programs with a profile only: give doppel one that says userns, or, for all programs: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
	}
	return uerr.Wrap(err, uerr.Denied, hint, "this machine does not let you make a user namespace")
}

// nameserverConf is the resolv.conf inside.
func nameserverConf(search []string) string {
	s := fmt.Sprintf("# written by doppel run for this command alone\nnameserver %v\n", Nameserver)
	if len(search) > 0 {
		s += "search " + strings.Join(search, " ") + "\n"
	}
	return s
}

// hostsFile is the hosts file inside: the machine's, and a name for the machine.
func hostsFile(machine string) string {
	if machine != "" && !strings.HasSuffix(machine, "\n") {
		machine += "\n"
	}
	return machine + fmt.Sprintf("%v %s\n", Host, HostName)
}

// where is the address to dial on the machine for one that was dialled inside; it is invalid where there is none. DNS is at dns.
func where(dst, dns netip.AddrPort) netip.AddrPort {
	a := dst.Addr().Unmap()
	switch {
	case a == Nameserver && dst.Port() == 53:
		return dns
	case a == Host:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dst.Port())
	case inside.Contains(a), !a.IsGlobalUnicast() && !a.IsLinkLocalUnicast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, dst.Port())
}

// inside holds the device's address and those above.
var inside = netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, 0, 0}), 29)
