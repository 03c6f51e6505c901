//go:build unix

package spawn

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/doppel-dev/doppel/internal/uerr"
)

func says(steps []Step) string {
	var out []string
	for _, s := range steps {
		out = append(out, s.Say)
	}
	return strings.Join(out, "; ")
}

func TestServiceSteps(t *testing.T) {
	for name, tt := range map[string]struct {
		m                  machine
		install, uninstall string
	}{
		"a fresh machine": {
			machine{User: "ada", Program: "/home/ada/bin/doppel-rootd"},
			"create the group doppel; add ada to the group doppel; copy /home/ada/bin/doppel-rootd to /usr/local/libexec/doppel-rootd; write /etc/systemd/system/doppel-rootd.service; have systemd read it; start the service at every boot; start the service",
			"remove /usr/local/libexec/doppel-rootd",
		},
		"installed before": {
			machine{Unit: true, Group: true, Member: true, User: "ada", Program: "/new/doppel-rootd"},
			"copy /new/doppel-rootd to /usr/local/libexec/doppel-rootd; write /etc/systemd/system/doppel-rootd.service; have systemd read it; start the service at every boot; start the service",
			"stop the service; remove /etc/systemd/system/doppel-rootd.service; have systemd forget it; remove /usr/local/libexec/doppel-rootd; remove the group doppel",
		},
		"from a package": {
			machine{Packaged: true, Group: true, User: "ada"},
			"add ada to the group doppel; start the service at every boot; start the service",
			"stop the service",
		},
		"installed before, and from a package": {
			machine{Unit: true, Packaged: true, Group: true, Member: true, User: "ada", Program: "/usr/bin/doppel-rootd"},
			"disable the service that was installed; remove /etc/systemd/system/doppel-rootd.service; have systemd forget it; remove /usr/local/libexec/doppel-rootd; start the service at every boot; start the service",
			"stop the service; remove /etc/systemd/system/doppel-rootd.service; have systemd forget it; remove /usr/local/libexec/doppel-rootd",
		},
		"root alone": {
			machine{Packaged: true, Group: true},
			"start the service at every boot; start the service",
			"stop the service",
		},
	} {
		if got := says(installSteps(tt.m)); got != tt.install {
			t.Errorf("%s: install: %s\nwant %s", name, got, tt.install)
		}
		if got := says(uninstallSteps(tt.m)); got != tt.uninstall {
			t.Errorf("%s: uninstall: %s\nwant %s", name, got, tt.uninstall)
		}
	}
}

// TestServiceInstall runs the steps on a directory that stands for the machine, with programs that only say how they were called.
func TestServiceInstall(t *testing.T) {
	bin, root := t.TempDir(), t.TempDir()
	out := filepath.Join(bin, "out")
	for _, p := range []string{"systemctl", "groupadd", "usermod", "groupdel"} {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("#!/bin/sh\necho \"$(basename $0) $*\" >>"+out+"\n"), 0o700); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(bin, RootProgram), []byte("the program"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":/bin:/usr/bin")
	s := Service{root: root}
	_, err := s.Install(t.Context(), "", false)
	if e := uerr.From(err); err == nil || e.Kind != uerr.Usage || !strings.Contains(e.Hint, "doppel-rootd --service") {
		t.Fatalf("without systemd: %v", err)
	}
	if err := os.MkdirAll(s.path(systemdRuns), 0o755); err != nil {
		t.Fatal(err)
	}
	if steps, err := s.Install(t.Context(), "", true); err != nil || len(steps) == 0 || s.exists(installedUnit) {
		t.Fatalf("dry run: %d steps, %v", len(steps), err)
	}
	for range 2 {
		if _, err := s.Install(t.Context(), "", false); err != nil {
			t.Fatal(err)
		}
	}
	unit, err := os.ReadFile(s.path(installedUnit))
	if err != nil || !strings.Contains(string(unit), "ExecStart=/usr/local/libexec/doppel-rootd --service\n") {
		t.Errorf("unit: %v\n%s", err, unit)
	}
	if fi, err := os.Stat(s.path(installedProgram)); err != nil || fi.Mode() != 0o755 {
		t.Errorf("program: %v, %v", fi, err)
	}
	if _, err := s.Uninstall(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	var left []string
	_ = filepath.Walk(root, func(p string, fi os.FileInfo, _ error) error {
		if !fi.IsDir() {
			left = append(left, p)
		}
		return nil
	})
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	b, _ := os.ReadFile(out)
	for _, want := range []string{"systemctl daemon-reload\n", "systemctl enable doppel-rootd.service\n", "systemctl restart doppel-rootd.service\n", "systemctl disable --now doppel-rootd.service\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("never called: %sbut\n%s", want, b)
		}
	}

	// A package that comes later has its own unit and program: those in /etc and /usr/local would go before them.
	for _, call := range []func(context.Context) error{
		func(ctx context.Context) error { _, err := s.Install(ctx, "", false); return err },
		func(ctx context.Context) error { _, err := s.Uninstall(ctx, false); return err },
	} {
		for _, p := range []string{packagedUnits[0], installedUnit, installedProgram} {
			if err := replaceFile(s.path(p), []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := call(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s.exists(installedUnit) || s.exists(installedProgram) || !s.exists(packagedUnits[0]) {
			t.Error("what was installed is still there, or what the package brought is not")
		}
	}
	if err := os.Remove(s.path(packagedUnits[0])); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(bin, "systemctl"), []byte("#!/bin/sh\necho the bus is gone >&2; exit 4\n"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	steps, err := s.Install(t.Context(), "", false)
	if err == nil || !strings.Contains(err.Error(), "the bus is gone") || len(steps) == 0 || len(steps) >= len(installSteps(machine{Group: true})) {
		t.Errorf("a step that fails: %v after %s", err, says(steps))
	}
	if _, err := s.Install(t.Context(), "no-such-user-here", true); uerr.From(err).Kind != uerr.Usage {
		t.Errorf("an unknown user: %v", err)
	}
}

// Users of a directory are in no file of this machine: getent knows them, by the name that counts.
func TestServiceUserOfDirectory(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin+":/bin:/usr/bin")
	s := Service{root: t.TempDir()}
	if err := os.MkdirAll(s.path(systemdRuns), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, RootProgram), []byte("the program"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		getent string // what it does
		who    string
		want   string // who is added; "": nobody is found
	}{
		"there":          {`test "$*" = "passwd ada-of-corp" && echo ada-of-corp:*:10001:10001:Ada:/home/ada:/bin/sh`, "ada-of-corp", "ada-of-corp"},
		"by other case":  {"echo ada-of-corp:*:10001:10001:Ada:/home/ada:/bin/sh", "ADA-of-corp", "ada-of-corp"},
		"not there":      {"exit 2", "ada-of-corp", ""},
		"says nothing":   {"true", "ada-of-corp", ""},
		"is no user":     {"echo hello", "ada-of-corp", ""},
		"like an option": {"echo ada-of-corp:*:10001:10001:Ada:/home/ada:/bin/sh", "--help", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(bin, "getent"), []byte("#!/bin/sh\n"+tt.getent+"\n"), 0o700); err != nil { //nolint:gosec // a program
				t.Fatal(err)
			}
			steps, err := s.Install(t.Context(), tt.who, true)
			if tt.want == "" {
				if uerr.From(err).Kind != uerr.Usage {
					t.Errorf("%v, %s", err, says(steps))
				}
			} else if err != nil || !strings.Contains(says(steps), "add "+tt.want+" to the group doppel") {
				t.Errorf("%v, %s", err, says(steps))
			}
		})
	}
}

// TestUnit has systemd itself judge the unit, and holds what makes it safe.
func TestUnit(t *testing.T) {
	text := Unit("/bin/true")
	for _, want := range []string{"ExecStart=/bin/true --service\n", "Group=doppel\n", "CapabilityBoundingSet=CAP_NET_ADMIN\n", "ProtectSystem=strict\n", "NoNewPrivileges=yes\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the unit lacks %s", want)
		}
	}
	file := filepath.Join(t.TempDir(), serviceUnit)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	analyze := func(args ...string) string {
		ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
		defer cancel()
		b, err := exec.CommandContext(ctx, "systemd-analyze", args...).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("systemd-analyze is not installed (Debian: systemd)")
		}
		if err != nil {
			t.Errorf("systemd-analyze %s: %v", strings.Join(args, " "), err)
		}
		return string(b)
	}
	if out := analyze("verify", file); strings.TrimSpace(out) != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	out := analyze("security", "--offline=true", "--threshold=25", file) // of 100, in tenths of what it prints
	if m := regexp.MustCompile(`Overall exposure level.*`).FindString(out); m != "" {
		t.Log(m)
	} else {
		t.Errorf("systemd-analyze security: %s", out)
	}
}
