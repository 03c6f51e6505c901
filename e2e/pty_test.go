package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a command that runs on a terminal of its own.
type terminal struct {
	t      *testing.T
	master *os.File
	done   chan error

	mu  sync.Mutex
	out bytes.Buffer // guarded by mu
}

// terminal runs a command of the laptop on a pseudo terminal (pty(7)).
func (l *laptop) terminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	cmd := l.command(context.Background(), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, master: master, done: make(chan error, 1)}
	go func() { _, _ = io.Copy(term, master) }()
	go func() { term.done <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = master.Close()
	})
	return term
}

// Write collects what the command prints.
func (term *terminal) Write(p []byte) (int, error) {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.out.Write(p)
}

func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.out.String()
}

// expect waits until the command has printed the text.
func (term *terminal) expect(text string) {
	term.t.Helper()
	eventually(term.t, 20*time.Second, func() error {
		if got := term.text(); !strings.Contains(got, text) {
			return fmt.Errorf("%q is missing on the terminal:\n%s", text, got)
		}
		return nil
	})
}

// send types the text.
func (term *terminal) send(text string) {
	term.t.Helper()
	if _, err := term.master.WriteString(text); err != nil {
		term.t.Fatal(err)
	}
}

// wait returns how the command ended.
func (term *terminal) wait() error {
	term.t.Helper()
	select {
	case err := <-term.done:
		return err
	case <-time.After(time.Minute):
		term.t.Fatalf("still running:\n%s", term.text())
		return nil
	}
}
