//go:build unix

package cli

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"
	"time"
)

// TestAttendFromTheStart: a signal that comes while the command is being started is handed on, too. Of SIGQUIT, at which a Java program, for example, shows what it
// is at and goes on, doppel does not end.
func TestAttendFromTheStart(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGQUIT} {
		mains := make(chan os.Signal, 1) // as doppel's main does, so that SIGTERM does not end this process
		signal.Notify(mains, syscall.SIGTERM)
		cmd := exec.Command("sh", "-c", `trap "exit 9" TERM QUIT; echo ready; while :; do sleep 0.05; done`)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		giveUp := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		err = attend(t.Context(), cmd, func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
				return err
			}
			if err := syscall.Kill(os.Getpid(), sig); err != nil {
				return err
			}
			if sig == syscall.SIGTERM {
				<-mains // delivered to all
			}
			return nil
		})
		var code exitCode
		if !errors.As(err, &code) || code != 9 {
			t.Errorf("%v: got %v, want exit code 9", sig, err)
		}
		giveUp.Stop()
		signal.Stop(mains)
	}
}

// A command is not started when a signal has come before: nobody would hand it on.
func TestAttendAfterTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := attend(ctx, exec.Command("true"), func() error { t.Error("started"); return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
