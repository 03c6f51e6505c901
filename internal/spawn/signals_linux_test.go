package spawn

import (
	"os/signal"
	"syscall"
	"testing"
	"time"
)

func TestInterruptible(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		ctx, stop := Interruptible(t.Context())
		if err := syscall.Kill(syscall.Getpid(), s); err != nil {
			t.Fatal(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
			t.Errorf("%v does not end it", s)
		}
		stop()
	}
	signal.Ignore(syscall.SIGHUP) // as nohup does
	defer signal.Reset(syscall.SIGHUP)
	_, stop := Interruptible(t.Context())
	defer stop()
	if !signal.Ignored(syscall.SIGHUP) {
		t.Error("with nohup the end of the terminal counts")
	}
}
