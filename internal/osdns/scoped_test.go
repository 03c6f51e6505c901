package osdns

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestScript(t *testing.T) {
	server := netip.MustParseAddrPort("127.0.0.1:53")
	for _, tt := range []struct {
		goos   string
		s      Scoped
		argv   string
		script string
	}{
		{
			"darwin",
			Scoped{Domains: []string{"svc", "cluster.local"}, Server: netip.MustParseAddrPort("127.0.0.1:5300")},
			"scutil",
			"d.init\nd.add ServerAddresses * 127.0.0.1\nd.add ServerPort # 5300\nd.add SupplementalMatchDomains * cluster.local svc\nd.add SupplementalMatchDomainsNoSearch # 1\nset State:/Network/Service/doppel/DNS\nquit\n",
		},
		{"darwin", Scoped{}, "scutil", "remove State:/Network/Service/doppel/DNS\nquit\n"},
		{
			"windows",
			Scoped{Domains: []string{"svc", "cluster.local"}, Server: server},
			"powershell -NoProfile -NonInteractive -Command -",
			"$ErrorActionPreference = 'Stop'\nGet-DnsClientNrptRule | Where-Object Comment -eq 'doppel' | Remove-DnsClientNrptRule -Force\nAdd-DnsClientNrptRule -Namespace '.cluster.local','.svc' -NameServers '127.0.0.1' -Comment 'doppel'\nClear-DnsClientCache\n",
		},
		{
			"windows",
			Scoped{},
			"powershell -NoProfile -NonInteractive -Command -",
			"$ErrorActionPreference = 'Stop'\nGet-DnsClientNrptRule | Where-Object Comment -eq 'doppel' | Remove-DnsClientNrptRule -Force\nClear-DnsClientCache\n",
		},
	} {
		argv, script, err := Script(tt.goos, tt.s)
		if err != nil || strings.Join(argv, " ") != tt.argv || script != tt.script {
			t.Errorf("%s %v: %q, %v\n%s", tt.goos, tt.s, argv, err, script)
		}
	}
	for name, tt := range map[string]struct {
		goos string
		s    Scoped
	}{
		"another port":  {"windows", Scoped{Domains: []string{"svc"}, Server: netip.MustParseAddrPort("127.0.0.1:5300")}},
		"no resolver":   {"darwin", Scoped{Domains: []string{"svc"}}},
		"other systems": {"plan9", Scoped{}},
		"a quote":       {"windows", Scoped{Domains: []string{"x'; Remove-Item C:\\"}, Server: server}},
		"a line":        {"darwin", Scoped{Domains: []string{"x\nquit"}, Server: server}},
		"a dot":         {"darwin", Scoped{Domains: []string{".svc"}, Server: server}},
		"nothing":       {"darwin", Scoped{Domains: []string{""}, Server: server}},
	} {
		if argv, _, err := Script(tt.goos, tt.s); err == nil {
			t.Errorf("%s: accepted: %v", name, argv)
		}
	}
}

func TestScopedApply(t *testing.T) {
	var got string
	fails := errors.New("exit status 1")
	run := func(_ context.Context, argv []string, stdin string) ([]byte, error) {
		got = argv[0] + " <" + stdin
		return []byte("no such key"), fails
	}
	if err := (Scoped{}).Apply(t.Context(), "darwin", run); !errors.Is(err, fails) || !strings.Contains(err.Error(), "no such key") {
		t.Errorf("a program that fails: %v", err)
	}
	if got != "scutil <remove State:/Network/Service/doppel/DNS\nquit\n" {
		t.Errorf("ran %s", got)
	}
	fails = nil
	if err := (Scoped{}).Apply(t.Context(), "windows", run); err != nil {
		t.Error(err)
	}
	if err := (Scoped{}).Apply(t.Context(), "plan9", run); err == nil {
		t.Error("another system: accepted")
	}
}
