// Package progress prints one line for each step of a long command.
package progress

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// Printer prints steps with the time since its making. Several goroutines may use it.
type Printer struct {
	out   io.Writer
	start time.Time

	mu sync.Mutex
}

// New returns a printer; its clock starts now.
func New(out io.Writer) *Printer {
	return &Printer{out: out, start: time.Now()}
}

// Step prints that a step is done.
func (p *Printer) Step(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "%6.1fs  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...))
}
