// Package e2e tests the lab as its users see it: the program, on the real machine.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/lab/internal/cluster"
	"github.com/doppel-dev/doppel/lab/internal/kubeapi"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// program is the lab's program and the name of one lab.
type program struct {
	t    *testing.T
	path string
	name string
}

// newProgram builds the program, for a lab of its own that is down before and after the test.
func newProgram(t *testing.T, name string) program {
	if os.Getenv("DOPPEL_LAB_E2E") != "1" {
		t.Skip("starts whole clusters on this machine; set DOPPEL_LAB_E2E=1")
	}
	p := program{t: t, path: filepath.Join(t.TempDir(), "lab"), name: name}
	if out, err := exec.Command("go", "build", "-o", p.path, "../cmd/lab").CombinedOutput(); err != nil {
		t.Fatalf("build the lab: %v\n%s", err, out)
	}
	p.must("down")
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := p.command("status").CombinedOutput()
			t.Logf("the lab at the end:\n%s", out)
		}
		p.must("down")
	})
	return p
}

func (p program) command(args ...string) *exec.Cmd {
	return exec.Command(p.path, append([]string{"--name", p.name}, args...)...)
}

// run returns standard output, standard error and the exit code.
func (p program) run(args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	var out, errOut bytes.Buffer
	cmd := p.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		p.t.Fatalf("lab %s: %v", strings.Join(args, " "), err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func (p program) must(args ...string) string {
	p.t.Helper()
	out, errOut, code := p.run(args...)
	if code != 0 {
		p.t.Fatalf("lab %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errOut)
	}
	return out
}

// laptop runs a shell command on a laptop and returns what it prints, standard error included.
func (p program) laptop(name, script string) (string, int) {
	p.t.Helper()
	out, errOut, code := p.run("laptop", "exec", name, "--", "bash", "-c", script)
	return out + errOut, code
}

func (p program) record() *state.Lab {
	p.t.Helper()
	lab, err := state.Load(p.name)
	if err != nil {
		p.t.Fatal(err)
	}
	return lab
}

func (p program) client() *kubeapi.Client {
	p.t.Helper()
	c, err := cluster.Client(p.record())
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

func (p program) state() string {
	p.t.Helper()
	out, _, _ := p.run("status", "-o", "json")
	var s struct{ State string }
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		p.t.Fatalf("status: %v\n%s", err, out)
	}
	return s.State
}

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	never := func(context.Context) error { return nil }
	if err := kubeapi.Poll(ctx, 50*time.Millisecond, never, check); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
