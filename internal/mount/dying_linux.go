package mount

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// dying says whether nobody waits any more for an operation that was interrupted. The kernel interrupts one for every signal that its thread gets, as
// SIGURG in programs written in Go or SIGCHLD in a shell, but it is carried out all the same: a program that is told EINTR, and does it again, is
// told then that it has been done.
func dying(ctx context.Context) bool {
	c, ok := fuse.FromContext(ctx)
	if !ok || c.Pid == 0 { // no program, or one in a PID namespace that is not seen from here
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Pid)) // of a thread, too
	return err != nil || doomed(status)
}

// dumping are the signals that end a process with a core dump. Of others that end one the kernel makes SIGKILL at once (complete_signal).
var dumping = mask(syscall.SIGQUIT, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGABRT, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGSEGV,
	syscall.SIGXCPU, syscall.SIGXFSZ, syscall.SIGSYS)

func mask(signals ...syscall.Signal) uint64 {
	var m uint64
	for _, s := range signals {
		m |= 1 << (s - 1)
	}
	return m
}

// doomed says whether a process waits for its end, by what proc_pid_status(5) tells.
func doomed(status []byte) bool {
	masks := map[string]uint64{}
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if m, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64); err == nil {
			masks[string(name)] = m
		}
	}
	pending := masks["SigPnd"] | masks["ShdPnd"]
	return pending&mask(syscall.SIGKILL) != 0 || pending&dumping&^(masks["SigBlk"]|masks["SigIgn"]|masks["SigCgt"]) != 0
}
