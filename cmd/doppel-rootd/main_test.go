package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// TestLinks keeps the privileged program small: what parses packets, speaks to Kubernetes or reads command lines of users runs without privilege.
func TestLinks(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, dep := range strings.Fields(string(out)) {
		for _, bad := range []string{"gvisor.dev/", "k8s.io/", "github.com/spf13/cobra", "net/http", "crypto/tls", "github.com/miekg/dns"} {
			if dep == bad || strings.HasSuffix(bad, "/") && strings.HasPrefix(dep, bad) {
				t.Errorf("links %s", dep)
			}
		}
	}
}

func TestCommandLine(t *testing.T) {
	_ = reflect.ValueOf(main) // links the program, so that go test's cache knows when it has changed
	bin := filepath.Join(t.TempDir(), "doppel-rootd")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	if out, err := exec.Command(bin, "--version").CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "doppel-rootd ") {
		t.Errorf("%s %v", out, err)
	}
	for _, args := range [][]string{{"stray"}, {"--socket", "relative"}, {"--no-such-flag"}} {
		cmd := exec.Command(bin, args...)
		out, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != 2 {
			t.Errorf("%v: exit code %d: %s", args, code, out)
		}
	}
	dir := t.TempDir()
	for _, link := range []func(string, string) error{os.Symlink, os.Link} {
		target, log := filepath.Join(dir, "target"), filepath.Join(dir, "log")
		if err := os.WriteFile(target, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := link(target, log); err != nil {
			t.Fatal(err)
		}
		if out, _ := exec.Command(bin, "--log", log, "--socket", "relative").CombinedOutput(); !strings.Contains(string(out), "open log") {
			t.Errorf("a log that is a link: %s", out)
		}
		os.Remove(log)
	}
	if out, _ := exec.Command(bin, "--log", filepath.Join(dir, "good"), "--socket", "relative").CombinedOutput(); strings.Contains(string(out), "open log") {
		t.Errorf("%s", out)
	}
}
