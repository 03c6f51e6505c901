// Package sched owns how the processes that carry traffic share the processors with those whose traffic it is.
package sched

import (
	"os"
	"runtime"
)

// Half has Go run this process's goroutines on half of the processors, unless GOMAXPROCS says on how many. What it carries begins and ends in other programs of the
// same machine, which need the other half: where all are busy, a second thread is one more to wake for each piece of data.
func Half() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(half(runtime.GOMAXPROCS(0)))
	}
}

func half(processors int) int { return max(1, processors/2) }
