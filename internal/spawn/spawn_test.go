//go:build unix

package spawn

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Environment variables that make this test's program a fake daemon.
const (
	envListen = "SPAWN_TEST_LISTEN" // network and socket to listen on
	envSay    = "SPAWN_TEST_SAY"    // a line for the log; the daemon then ends
	envPID    = "SPAWN_TEST_PID"    // where its process id, session and arguments go
	envLinger = "SPAWN_TEST_LINGER" // how long it lives after it has stopped listening, which it does on SIGTERM
)

func TestMain(m *testing.M) {
	if os.Getenv(envListen) != "" || os.Getenv(envSay) != "" {
		os.Exit(fakeDaemon())
	}
	os.Exit(m.Run())
}

// fakeDaemon is what the tests start in place of doppel daemon and doppel-rootd.
func fakeDaemon() int {
	sid, _, _ := syscall.Syscall(syscall.SYS_GETSID, 0, 0, 0)
	facts := fmt.Sprintf("%d %d %s", os.Getpid(), sid, strings.Join(os.Args[1:], " "))
	if err := os.WriteFile(os.Getenv(envPID)+".new", []byte(facts), 0o600); err != nil {
		return 1
	}
	if err := os.Rename(os.Getenv(envPID)+".new", os.Getenv(envPID)); err != nil {
		return 1
	}
	if say := os.Getenv(envSay); say != "" {
		f, err := os.OpenFile(os.Args[slices.Index(os.Args, "--log")+1], os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return 1
		}
		fmt.Fprintln(f, say)
		return 1
	}
	network, socket, _ := strings.Cut(os.Getenv(envListen), " ")
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		return 1
	}
	l, err := net.Listen(network, socket)
	if err != nil {
		return 1
	}
	if linger, err := time.ParseDuration(os.Getenv(envLinger)); err == nil {
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		go func() {
			<-stop
			_ = l.Close()
			time.Sleep(linger)
			os.Exit(0)
		}()
	}
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			select {}
		}
		if err != nil {
			return 1
		}
		_ = c.Close()
	}
}

// daemonWorld gives the fake daemon its places and ends it with the test. It returns a function that reads its facts.
func daemonWorld(t *testing.T) (dir string, facts func() (pid, sid int, args string)) {
	t.Helper()
	dir = t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("XDG_STATE_HOME", dir)
	t.Setenv(envPID, pidFile)
	facts = func() (pid, sid int, args string) {
		b, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		f := strings.SplitN(string(b), " ", 3)
		pid, _ = strconv.Atoi(f[0])
		sid, _ = strconv.Atoi(f[1])
		return pid, sid, f[2]
	}
	t.Cleanup(func() {
		if _, err := os.Stat(pidFile); err == nil {
			pid, _, _ := facts()
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return dir, facts
}

func TestUserDaemon(t *testing.T) {
	dir, facts := daemonWorld(t)
	t.Setenv(envListen, "unix "+localapi.DaemonSocket())
	started, err := UserDaemon(t.Context())
	if err != nil || !started {
		t.Fatalf("started %v, %v", started, err)
	}
	pid, sid, args := facts()
	if want := "daemon --log " + filepath.Join(dir, "doppel", "daemon.log"); args != want {
		t.Errorf("started with %q, want %q", args, want)
	}
	if sid != pid {
		t.Errorf("session %d, process %d: it would end with the terminal", sid, pid)
	}
	if started, err = UserDaemon(t.Context()); err != nil || started {
		t.Errorf("again: started %v, %v", started, err)
	}
}

// A daemon that listens no more but has not ended holds its files: it is waited for.
func TestWaitStopped(t *testing.T) {
	_, facts := daemonWorld(t)
	t.Setenv(envListen, "unix "+localapi.DaemonSocket())
	t.Setenv(envLinger, "300ms")
	if _, err := UserDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	pid, _, _ := facts()
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := WaitStopped(t.Context(), pid); err != nil {
		t.Fatal(err)
	}
	// Nobody may have waited for it.
	if state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(state), ") Z ") {
		t.Errorf("it has not ended: %s", state)
	}
}

// A daemon that does not come up is explained with what it said this time.
func TestDaemonDoesNotStart(t *testing.T) {
	dir, _ := daemonWorld(t)
	logFile := filepath.Join(dir, "doppel", "daemon.log")
	if err := errors.Join(os.MkdirAll(filepath.Dir(logFile), 0o700), os.WriteFile(logFile, []byte("an error of last week\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv(envSay, "level=ERROR msg=ended err=no space left")
	begin := time.Now()
	_, err := UserDaemon(t.Context())
	var e *uerr.Error
	if !errors.As(err, &e) || e.Msg != "the user daemon did not start: level=ERROR msg=ended err=no space left" || !strings.Contains(e.Hint, logFile) {
		t.Errorf("got %v", err)
	}
	if d := time.Since(begin); d > startTimeout+2*time.Second {
		t.Errorf("after %s", d)
	}
}

// Who interrupts a start is told of a daemon that is there all the same, and can be stopped: it answers by then.
func TestStartInterrupted(t *testing.T) {
	dir, _ := daemonWorld(t)
	d := daemon{"the daemon", "unix", filepath.Join(dir, "late.sock"), filepath.Join(dir, "log")}
	ctx, cancel := context.WithCancel(t.Context())
	started, err := d.start(ctx, func() error {
		cancel()
		time.AfterFunc(100*time.Millisecond, func() {
			l, err := net.Listen(d.network, d.socket)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = l.Close() })
		})
		return nil
	})
	if !started || !errors.Is(err, context.Canceled) {
		t.Errorf("started %v, %v", started, err)
	}
	if !answers(d.network, d.socket) {
		t.Error("it does not answer yet")
	}
	no := errors.New("no")
	if started, err := d.start(t.Context(), func() error { return no }); started || !errors.Is(err, no) {
		t.Errorf("started %v, %v", started, err)
	}
}

func TestLastLine(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	if got := lastLine(file, 0); got != "" || size(file) != 0 {
		t.Errorf("no log: %q", got)
	}
	for _, tt := range []struct {
		text   string
		offset int64
		want   string
	}{
		{"one\ntwo\n", 0, ": two"},
		{"one\ntwo\n", 4, ": two"},
		{"one\ntwo\n", 8, ""},
		{"fresh\n", 100, ": fresh"}, // begun anew because it had grown too large
		{"", 0, ""},
	} {
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastLine(file, tt.offset); got != tt.want {
			t.Errorf("%q from %d: %q, want %q", tt.text, tt.offset, got, tt.want)
		}
	}
}

// fakeSudo puts a program called sudo, a shell script, at the front of PATH; without a script PATH has no sudo.
func fakeSudo(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if script != "" {
		if err := os.WriteFile(filepath.Join(dir, "sudo"), []byte("#!/bin/sh\n"+script), 0o700); err != nil { //nolint:gosec // a program
			t.Fatal(err)
		}
		dir += ":/bin:/usr/bin"
	}
	t.Setenv("PATH", dir)
}

func TestThroughSudo(t *testing.T) {
	for name, tt := range map[string]struct {
		script string
		mayAsk bool
		asked  bool
		want   string // of the error
		args   string // what sudo was called with at last
	}{
		"no password needed":       {script: `printf '%s\n' "$*" >>"$OUT"`, args: "-n -b -- /x/rootd --socket s"},
		"a password, no terminal":  {script: `printf '%s\n' "$*" >>"$OUT"; exit 1`, want: "sudo needs a password", args: "-n -b -- /x/rootd --socket s"},
		"a password, given":        {script: `printf '%s\n' "$*" >>"$OUT"; [ "$1" != -n ]`, mayAsk: true, asked: true, args: "-b -- /x/rootd --socket s"},
		"a password, three errors": {script: `printf '%s\n' "$*" >>"$OUT"; exit 1`, mayAsk: true, asked: true, want: "sudo did not start the root daemon", args: "-b -- /x/rootd --socket s"},
		"no sudo":                  {mayAsk: true, want: "there is no sudo"},
	} {
		t.Run(name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "out")
			t.Setenv("OUT", out)
			fakeSudo(t, tt.script)
			asked := false
			err := throughSudo(t.Context(), Root{MayAsk: tt.mayAsk, Reason: func() { asked = true }}, "/x/rootd", []string{"--socket", "s"})
			var e *uerr.Error
			if (err == nil) != (tt.want == "") || err != nil && (!errors.As(err, &e) || e.Kind != uerr.Denied || e.Hint == "" || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if asked != tt.asked {
				t.Errorf("the reason was told: %v", asked)
			}
			b, _ := os.ReadFile(out)
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			if got := lines[len(lines)-1]; got != tt.args {
				t.Errorf("sudo was called with %q, want %q", got, tt.args)
			}
		})
	}
}

func TestFind(t *testing.T) {
	if _, err := Find("no-such-program"); uerr.From(err).Kind != uerr.Usage || !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if err := os.WriteFile(filepath.Join(dir, "prog"), nil, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	if got, err := Find("prog"); err != nil || got != filepath.Join(dir, "prog") {
		t.Errorf("in PATH: %s, %v", got, err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Find(filepath.Base(self)); err != nil || got != self {
		t.Errorf("beside us: %s, %v", got, err)
	}
}
