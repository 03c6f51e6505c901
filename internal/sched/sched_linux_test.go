package sched

import (
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// All threads have the policy, also those that begin later; one that somebody has chosen is kept.
func TestBatch(t *testing.T) {
	const chosen = 5 // SCHED_IDLE
	own := make(chan int)
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		own <- unix.Gettid()
		<-end
	})
	idle := <-own
	if err := unix.SchedSetAttr(idle, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: chosen}, 0); err != nil {
		t.Fatal(err)
	}
	if err := batch(); err != nil {
		t.Fatal(err)
	}
	var ready sync.WaitGroup
	for range 8 {
		ready.Add(1)
		wg.Go(func() {
			runtime.LockOSThread()
			ready.Done()
			<-end
		})
	}
	ready.Wait()
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	batch := 0
	for _, th := range threads {
		tid, err := strconv.Atoi(th.Name())
		if err != nil {
			t.Fatal(err)
		}
		a, err := unix.SchedGetAttr(tid, 0)
		if err != nil {
			t.Error(err)
			continue
		}
		switch {
		case a.Policy == schedBatch:
			batch++
		case tid == idle && a.Policy != chosen, a.Policy == schedOther:
			t.Errorf("thread %d has policy %d", tid, a.Policy)
		}
	}
	if batch < 8 {
		t.Errorf("%d of %d threads have the policy", batch, len(threads))
	}
	close(end)
	wg.Wait()
}
