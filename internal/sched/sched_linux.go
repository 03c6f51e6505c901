package sched

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	schedOther = 0 // SCHED_OTHER, sched(7)
	schedBatch = 3 // SCHED_BATCH
	// passes over all threads, until there is none to change.
	passes = 10
)

// Batch has a thread of this process, when it wakes, wait until whoever has the processor stops or has had his share, as SCHED_BATCH of sched(7) does. Data
// comes in pieces from the process before, which is in the middle of more when it wakes us: to push it aside for each piece is two context switches for
// what could have been one, and costs a quarter of all that two busy processors carry. Where a processor is idle it changes little. A policy that
// somebody has chosen for the process is kept; the process's own children inherit it.
func Batch(log *slog.Logger) {
	if err := batch(); err != nil { // a sandbox may forbid it
		log.Debug("scheduled as other programs are", "err", err)
	}
}

func batch() error {
	for range passes { // a thread that begins meanwhile has the policy of the one that made it
		more, err := batchAll()
		if err != nil || !more {
			return err
		}
	}
	return errors.New("threads come faster than they are counted")
}

// batchAll reports whether there was a thread to change.
func batchAll() (more bool, err error) {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return false, fmt.Errorf("threads: %w", err)
	}
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return false, fmt.Errorf("threads: %w", err)
		}
		a, err := unix.SchedGetAttr(tid, 0)
		if err == nil && a.Policy == schedOther {
			a.Policy, a.Runtime, more = schedBatch, 0, true
			err = unix.SchedSetAttr(tid, a, 0)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) { // a thread that has ended
			return false, os.NewSyscallError("sched_setattr", err)
		}
	}
	return more, nil
}
