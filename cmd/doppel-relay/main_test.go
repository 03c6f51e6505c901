package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

func build(t *testing.T) string {
	t.Helper()
	_ = reflect.ValueOf(main) // links the program, so that go test's cache knows when it has changed
	bin := filepath.Join(t.TempDir(), "doppel-relay")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	return bin
}

// TestFlags compares the program's flags with its manual and with docs/relay.md.
func TestFlags(t *testing.T) {
	help, _ := exec.Command(build(t), "-h").CombinedOutput() // exit code 2
	flags := regexp.MustCompile(`(?m)^  -(\S+)`).FindAllStringSubmatch(string(help), -1)
	if len(flags) < 10 {
		t.Fatalf("%s", help)
	}
	known := map[string]bool{}
	for _, f := range flags {
		known[f[1]] = true
	}
	for file, re := range map[string]string{"../../packaging/doppel-relay.8": `\\fB\\-([a-z\\-]+)\\fR`, "../../docs/relay.md": "`-([a-z][a-z-]+)[ `]"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		said := map[string]bool{"version": true} // that needs no words
		for _, m := range regexp.MustCompile(re).FindAllStringSubmatch(string(b), -1) {
			name := strings.ReplaceAll(m[1], `\`, "")
			said[name] = true
			if !known[name] {
				t.Errorf("%s: there is no flag -%s", file, name)
			}
		}
		for name := range known {
			if !said[name] {
				t.Errorf("%s does not have -%s", file, name)
			}
		}
	}
}

// TestRefused: what would be ignored, or mean something else than it says, keeps the relay from starting.
func TestRefused(t *testing.T) {
	bin, dir := build(t), t.TempDir()
	for want, args := range map[string][]string{
		`"oops" is no flag, and nothing else is taken`:                      {"oops", "-keep-visits", "1h"},
		`"true" is no flag, and nothing else is taken`:                      {"-print-ca", "true", "-data", dir},
		`invalid value "0" for flag -keep-visits: want a time above zero`:   {"-keep-visits", "0"},
		`invalid value "-1h" for flag -keep-visits: want a time above zero`: {"-keep-visits", "-1h"},
		`invalid value "30d" for flag -keep-visits`:                         {"-keep-visits", "30d"},
	} {
		// Without a directory that it may make it ends in any case.
		args = append([]string{"-url", "https://relay.test", "-data", "/dev/null/none"}, args...)
		out, err := exec.CommandContext(t.Context(), bin, args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%q: %v %s, want %q", args, err, out, want)
		}
	}
}

// TestUnit has systemd itself judge the unit of the package.
func TestUnit(t *testing.T) {
	b, err := os.ReadFile("../../packaging/doppel-relay.service")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "doppel-relay.service")
	if err := os.WriteFile(file, []byte(strings.Replace(string(b), "/usr/bin/doppel-relay", "/bin/true", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"verify", file}, {"security", "--offline=true", "--threshold=20", file}} { // of 100, in tenths of what it prints
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", args...).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("systemd-analyze is not installed (Debian: systemd)")
		}
		if err != nil || args[0] == "verify" && strings.TrimSpace(string(out)) != "" {
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
}
