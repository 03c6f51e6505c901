package osdns

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// Scoped are domains that the system is to ask a resolver of ours for: the way of macOS and Windows, which capture nothing else.
type Scoped struct {
	Domains []string // "cluster.local", "svc"; none removes all
	Server  netip.AddrPort
}

// Apply puts s in force by a program that run runs with an input; the zero value removes what was in force. The scripts are tested, but
// nobody has run them on macOS or Windows yet.
func (s Scoped) Apply(ctx context.Context, goos string, run func(ctx context.Context, argv []string, stdin string) ([]byte, error)) error {
	argv, stdin, err := Script(goos, s)
	if err != nil {
		return err
	}
	if out, err := run(ctx, argv, stdin); err != nil {
		return fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Script is a program with its input that puts s in force, in place of what it had put in force before. goos is darwin or windows.
//
// macOS keeps the settings until they are removed or the machine starts again (scutil(8)), Windows for good (NRPT), so whoever starts after
// a crash applies the zero value first.
func Script(goos string, s Scoped) (argv []string, stdin string, err error) {
	for _, d := range s.Domains {
		if !plainDomain(d) {
			return nil, "", uerr.New(uerr.Usage, "", "%q is no domain", d)
		}
	}
	if len(s.Domains) > 0 && !s.Server.IsValid() {
		return nil, "", uerr.New(uerr.Usage, "", "domains without a resolver")
	}
	s.Domains = slices.Sorted(slices.Values(s.Domains))
	switch goos {
	case "darwin":
		return []string{"scutil"}, scutil(s), nil
	case "windows":
		// A rule cannot name a port.
		if len(s.Domains) > 0 && s.Server.Port() != Port {
			return nil, "", uerr.New(uerr.Internal, "", "Windows asks resolvers on port %d only, not %v", Port, s.Server)
		}
		return []string{"powershell", "-NoProfile", "-NonInteractive", "-Command", "-"}, nrpt(s), nil
	}
	return nil, "", uerr.New(uerr.Internal, "", "no scoped resolvers on %s", goos)
}

const scutilKey = "State:/Network/Service/doppel/DNS"

func scutil(s Scoped) string {
	if len(s.Domains) == 0 {
		return "remove " + scutilKey + "\nquit\n"
	}
	return "d.init\n" +
		"d.add ServerAddresses * " + s.Server.Addr().String() + "\n" +
		fmt.Sprintf("d.add ServerPort # %d\n", s.Server.Port()) +
		"d.add SupplementalMatchDomains * " + strings.Join(s.Domains, " ") + "\n" +
		"d.add SupplementalMatchDomainsNoSearch # 1\n" +
		"set " + scutilKey + "\nquit\n"
}

// nrptMark is the comment by which our rules are known.
const nrptMark = "doppel"

func nrpt(s Scoped) string {
	out := "$ErrorActionPreference = 'Stop'\n" +
		"Get-DnsClientNrptRule | Where-Object Comment -eq '" + nrptMark + "' | Remove-DnsClientNrptRule -Force\n"
	if len(s.Domains) > 0 {
		names := make([]string, len(s.Domains))
		for i, d := range s.Domains {
			names[i] = "'." + d + "'" // with the dot: the domain and all below it
		}
		out += fmt.Sprintf("Add-DnsClientNrptRule -Namespace %s -NameServers '%v' -Comment '%s'\n", strings.Join(names, ","), s.Server.Addr(), nrptMark)
	}
	return out + "Clear-DnsClientCache\n"
}

// plainDomain keeps everything but letters, digits, '-', '_' and dots out of scripts.
func plainDomain(d string) bool {
	if d == "" || len(d) > 253 || strings.HasPrefix(d, ".") || strings.HasSuffix(d, ".") {
		return false
	}
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.'
	}
	return !strings.ContainsFunc(d, func(r rune) bool { return !plain(r) })
}
