package ns

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/lab/internal/state"
)

func TestStartTime(t *testing.T) {
	write := func(s string) string {
		path := filepath.Join(t.TempDir(), "stat")
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const rest = " 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21"
	if got, err := startTime(write("42 (a (b) c) S" + rest)); err != nil || got != 4711 {
		t.Errorf("%d %v, want 4711", got, err)
	}
	if _, err := startTime(write("42 (x) Z" + rest)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a zombie: %v", err)
	}
	if _, err := startTime(write("nonsense")); err == nil {
		t.Error("nonsense is accepted")
	}
}

func TestAliveAndKill(t *testing.T) {
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	another := state.Process{PID: p.PID, Start: p.Start + 1}
	if !Alive(p) || Alive(another) || Alive(state.Process{}) {
		t.Error("a process is told by more than its id")
	}
	if err := Kill(another, time.Second); err != nil {
		t.Errorf("a process that is gone: %v", err)
	}
	if !Alive(p) {
		t.Fatal("the wrong process was killed")
	}
	if err := Kill(p, 10*time.Second); err != nil {
		t.Error(err)
	}
	if Alive(p) {
		t.Error("it still runs")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it ended by itself")
	}
}

// A killed process whose parent has not heard of it is not alive, and still there.
func TestReaped(t *testing.T) {
	self, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !AliveInside(self, p) || ReapedInside(self, p) {
		t.Error("it runs")
	}
	if err := Kill(p, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if AliveInside(self, p) || ReapedInside(self, p) {
		t.Error("it is a zombie")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it ended by itself")
	}
	if !ReapedInside(self, p) || ReapedInside(self, self) || !ReapedInside(self, state.Process{PID: self.PID, Start: self.Start + 1}) {
		t.Error("what is gone is told from what is there")
	}
}

func TestExitCode(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137} {
		if got, ran := ExitCode(exec.Command("sh", "-c", script).Run()); !ran || got != want {
			t.Errorf("%s: %d %t, want %d", script, got, ran, want)
		}
	}
	if _, ran := ExitCode(errors.New("x")); ran {
		t.Error("another error counts as an exit")
	}
}
