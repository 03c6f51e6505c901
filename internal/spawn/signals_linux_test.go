package spawn

import (
	"os"
	"slices"
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
	outlives = true // as nohup has it
	defer func() { outlives = false }()
	if slices.Contains(Ends(syscall.SIGTERM), os.Signal(syscall.SIGHUP)) {
		t.Error("with nohup the end of the terminal counts")
	}
}
