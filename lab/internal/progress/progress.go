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
	out     io.Writer
	start   time.Time
	verbose bool

	mu sync.Mutex
}

// New returns a printer; its clock starts now. Only a verbose one prints details.
func New(out io.Writer, verbose bool) *Printer {
	return &Printer{out: out, start: time.Now(), verbose: verbose}
}

// Detail prints what only a verbose printer says.
func (p *Printer) Detail(format string, args ...any) {
	if p.verbose {
		p.Step(format, args...)
	}
}

// Step prints that a step is done.
func (p *Printer) Step(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "%6.1fs  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...))
}
