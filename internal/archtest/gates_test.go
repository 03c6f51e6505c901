package archtest

import (
	"strings"
	"testing"
)

// made builds a package of ours that imports some of ours (with "/internal/…" or the like) and of others.
func made(name string, imports ...string) pkg {
	p := pkg{ImportPath: module + name, Name: name[strings.LastIndexByte(name, '/')+1:], Imports: imports}
	for i, imported := range imports {
		if hasPrefix(imported, []string{"internal", "api", "cmd", "examples"}) {
			p.Imports[i] = module + imported
		}
	}
	return p
}

// Each gate is seen to open and to close.
func TestGates(t *testing.T) {
	foreign := []pkg{{ImportPath: "example.com/lib", Imports: []string{"k8s.io/api/core/v1"}}}
	tests := []struct {
		name string
		rule func([]pkg) []string
		pkgs []pkg
		want string // part of the one violation; "" for none
	}{
		{"down", layerViolations, []pkg{made("internal/flow", "internal/wire", "net")}, ""},
		{"up", layerViolations, []pkg{made("internal/wire", "internal/flow")}, "imports go down only"},
		{"sideways, allowed", layerViolations, []pkg{made("internal/netstack", "internal/flow")}, ""},
		{"sideways", layerViolations, []pkg{made("internal/flow", "internal/netstack")}, "not in sideways"},
		{"unknown", layerViolations, []pkg{made("internal/helpers")}, "in no layer"},
		{"a test's package", layerViolations, []pkg{made("internal/flow", "internal/mux/muxtest")}, "for tests"},
		{"by a test's package", layerViolations, []pkg{made("internal/mux/muxtest", "internal/cli", "internal/nettest")}, ""},
		{"an example", layerViolations, []pkg{made("examples/a", "internal/wire")}, "stands outside"},
		{"a leaf with a library", layerViolations, []pkg{made("internal/uerr", "example.com/lib")}, "imports only"},
		{"a leaf with x", layerViolations, []pkg{made("internal/uerr", "golang.org/x/sys/unix")}, ""},
		{
			"Kubernetes through a library", layerViolations, append([]pkg{made("internal/flow", "example.com/lib")}, foreign...),
			"internal/flow → example.com/lib → k8s.io/api/core/v1",
		},
		{"an engine with flags", layerViolations, []pkg{made("internal/flow", "flag")}, "must not link flag"},

		{"the importer", importerViolations, []pkg{made("internal/netstack", "gvisor.dev/gvisor/pkg/tcpip")}, ""},
		{"another importer", importerViolations, []pkg{made("internal/userd", "gvisor.dev/gvisor/pkg/tcpip")}, "only [internal/netstack] do"},
		{"a longer name", importerViolations, []pkg{made("internal/userd", "gvisor.dev/gvisor2")}, ""},

		{
			"a forbidden link", linkViolations, append([]pkg{made("cmd/doppel-rootd", "internal/rootd"), made("internal/rootd", "example.com/lib")}, foreign...),
			"cmd/doppel-rootd → internal/rootd → example.com/lib → k8s.io/api/core/v1",
		},
		{
			"a link by whom it is granted", linkViolations,
			[]pkg{made("cmd/doppel-rootd", "internal/osdns"), made("internal/osdns", "github.com/godbus/dbus/v5"), {ImportPath: "github.com/godbus/dbus/v5", Imports: []string{"os/exec"}}, {ImportPath: "os/exec"}},
			"",
		},
		{
			"the same link by another", linkViolations,
			[]pkg{made("cmd/doppel-rootd", "internal/osdns"), made("internal/osdns", "github.com/godbus/dbus/v5", "os/exec"), {ImportPath: "github.com/godbus/dbus/v5", Imports: []string{"os/exec"}}, {ImportPath: "os/exec"}},
			"internal/osdns → os/exec",
		},
		{"no forbidden link", linkViolations, []pkg{made("cmd/doppel-rootd", "internal/rootd"), made("internal/rootd", "net")}, ""},
		{"a new binary", linkViolations, []pkg{made("cmd/new")}, "no entry in links"},
	}
	for _, tt := range tests {
		expect(t, tt.name, tt.rule(tt.pkgs), tt.want)
	}
}

func TestFileGates(t *testing.T) {
	long := "// Command doppel is long.\npackage main\n" + strings.Repeat("\n// comment\nvar _ = 1\n", maxMain)
	tests := []struct {
		name, path, text string
		rule             func(pkg, []source) []string
		want             string
	}{
		{"doc", "internal/a", "// Package a owns it.\npackage a", docViolations, ""},
		{"doc of two lines", "internal/a", "// Package a owns it,\n// and more.\n//\n// Further. Things.\npackage a", docViolations, ""},
		{"no doc", "internal/a", "package a", docViolations, "0 files"},
		{"another verb", "internal/a", "// Package a does it.\npackage a", docViolations, `"Package a owns "`},
		{"two sentences", "internal/a", "// Package a owns it. And more.\npackage a", docViolations, "one sentence"},
		{"no full stop", "internal/a", "// Package a owns it\npackage a", docViolations, "one sentence"},
		{"a command", "cmd/doppel", "// Command doppel runs.\npackage main", docViolations, ""},
		{"a command like a package", "cmd/doppel", "// Package main runs.\npackage main", docViolations, `"Command doppel "`},
		{"outside", "charts/a", "// Package a holds it.\npackage a", docViolations, ""},
		{"a long main", "cmd/doppel", long, mainViolations, "61 lines"},
		{"a long package", "internal/a", long, mainViolations, ""},
		{"a main that just fits", "cmd/doppel", strings.Replace(long, "var _ = 1\n", "", 1), mainViolations, ""},
		{"GOOS", "internal/a", "package a\nimport \"runtime\"\nvar os = runtime.GOOS", goosViolations, "internal/a/a.go:3"},
		{"GOOS in a main", "cmd/doppel", "package main\nimport \"runtime\"\nvar os = runtime.GOOS", goosViolations, ""},
		{"another GOOS", "internal/a", "package a\nvar os = cfg.GOOS", goosViolations, ""},
	}
	for _, tt := range tests {
		f := parse(t, tt.path+"/a.go", []byte(tt.text))
		p := pkg{ImportPath: module + tt.path, Name: f.ast.Name.Name}
		expect(t, tt.name, tt.rule(p, []source{f}), tt.want)
	}
}

func expect(t *testing.T, name string, got []string, want string) {
	t.Helper()
	switch {
	case want == "" && len(got) > 0:
		t.Errorf("%s: unexpected %q", name, got)
	case want != "" && (len(got) != 1 || !strings.Contains(got[0], want)):
		t.Errorf("%s: got %q, want one with %q", name, got, want)
	}
}
