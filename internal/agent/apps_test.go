package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/environ"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// startShowing runs an agent that has the environment and a volume of a container.
func startShowing(t *testing.T) (w *world, volume string) {
	t.Helper()
	t.Parallel()
	volume = t.TempDir()
	w = &world{t: t, app: newApp(t, sayApp), mgr: newManager(t), done: make(chan error, 1)}
	w.cfg = &agentcfg.Config{
		Managers: []string{w.mgr.addr()}, ManagerKey: w.mgr.id.Fingerprint(), HealthPort: freePort(t),
		Ports: []agentcfg.Port{{Protocol: "TCP", ContainerPort: w.app.port(), Container: "app", AgentPort: freePort(t), Way: agentcfg.ByName, Name: "http"}},
		Apps:  []agentcfg.App{{Container: "app", Prefix: environ.Prefix + "0_", Volumes: []agentcfg.Volume{{Path: "/data", Dir: volume, ReadOnly: true}}}},
	}
	w.env = []string{"PATH=/bin", "HOSTNAME=web-1", "DOPPEL_ENV_0_USER=shop", "DOPPEL_ENV_1_USER=other", "DB_SERVICE_HOST=10.0.0.1"}
	w.run()
	return w, volume
}

// show tells the agent whose laptop sees what.
func (w *world) show(s *mux.Session, shown ...control.Shown) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), deadline)
	defer cancel()
	if err := tunnel.Control(ctx, s, control.ManagerIntercepts, control.Table{Shown: shown}, nil); err != nil {
		w.t.Fatal(err)
	}
}

func TestEnvironment(t *testing.T) {
	w, _ := startShowing(t)
	s := w.mgr.up()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	var got control.Environment
	if err := tunnel.Control(ctx, s, control.ManagerEnvironment, control.AskEnvironment{Container: "app"}, &got); err != nil {
		t.Fatal(err)
	}
	want := control.Environment{
		Container: "app", Variables: environ.Env{"USER": "shop", "HOSTNAME": "web-1", "DB_SERVICE_HOST": "10.0.0.1"},
		Volumes: []control.Volume{{Path: "/data", ReadOnly: true}},
	}
	if d := cmp.Diff(want, got, cmp.Transformer("map", func(e environ.Env) map[string]string { return e })); d != "" {
		t.Error(d)
	}
	if err := tunnel.Control(ctx, s, control.ManagerEnvironment, control.AskEnvironment{Container: "hidden"}, &got); codeOf(err) != wire.CodeNotFound {
		t.Errorf("another container: %v", err)
	}
}

func codeOf(err error) wire.Code {
	var re *mux.RejectError
	if errors.As(err, &re) {
		return re.Code
	}
	return wire.CodeNone
}

func TestFiles(t *testing.T) {
	w, volume := startShowing(t)
	if err := os.WriteFile(filepath.Join(volume, "f"), []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := w.mgr.up()
	open := func(uid string) (*mux.Stream, error) {
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		st, _, err := s.Open(ctx, wire.AppendFiles(nil, uid))
		return st, err
	}
	if _, err := open("mine"); codeOf(err) != wire.CodeNotFound {
		t.Errorf("before the table says so: %v", err)
	}
	w.show(s, control.Shown{Intercept: "mine", Container: "app"}, control.Shown{Intercept: "other", Container: "hidden"})
	if _, err := open("other"); codeOf(err) != wire.CodeNotFound {
		t.Errorf("a container that it does not have: %v", err)
	}
	var clients []*sftp.Client
	for range maxFileStreams {
		st, err := open("mine")
		if err != nil {
			t.Fatal(err)
		}
		c, err := sftp.NewClientPipe(st, st)
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	f, err := clients[0].Open("/data/f")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(f); string(b) != "text" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := clients[0].Create("/data/g"); err == nil {
		t.Error("written to what is read-only")
	}
	if _, err := open("mine"); codeOf(err) != wire.CodeBusy {
		t.Errorf("one too many: %v", err)
	}
	_ = clients[0].Close()
	w.until("another is served", func() bool {
		st, err := open("mine")
		if err == nil {
			_ = st.Close()
		}
		return err == nil
	})
	// Who no longer has an intercept sees nothing more.
	w.show(s, control.Shown{Intercept: "other", Container: "app"})
	for _, c := range clients[1:] {
		_ = c.Wait() // a reset, in whatever form it comes
	}
	if _, err := clients[1].Stat("/data/f"); err == nil {
		t.Error("the files are served after the intercept's end")
	}
}

// Environ leaves nothing of the apps in the process's environment, which everybody in the container may read and children inherit.
func TestEnviron(t *testing.T) {
	if os.Getenv("DOPPEL_TEST_ENVIRON") != "" {
		env, err := Environ()
		if err != nil {
			t.Fatal(err)
		}
		mine, err := os.ReadFile("/proc/self/environ")
		if err != nil || strings.Contains(string(mine), "hidden") || slices.Contains(os.Environ(), "DOPPEL_ENV_0_SECRET=hidden\nsecret") {
			t.Errorf("%q, %v", mine, err)
		}
		if !slices.Contains(env, "DOPPEL_ENV_0_SECRET=hidden\nsecret") || !slices.Contains(env, "DOPPEL_TEST_ENVIRON=1") || !slices.Contains(env, "DOPPEL_ENV_1_EMPTY=") {
			t.Errorf("%q", env)
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestEnviron$", "-test.v")
	cmd.Env = append(os.Environ(), "DOPPEL_TEST_ENVIRON=1", "DOPPEL_ENV_0_SECRET=hidden\nsecret", "DOPPEL_ENV_1_EMPTY=")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestEnviron") {
		t.Errorf("%v\n%s", err, out)
	}
}
