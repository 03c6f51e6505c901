package cli

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// runInside runs a command with our standard streams and environment in the namespaces of a holder.
func runInside(holder state.Process, argv []string) error {
	c := ns.Command{Argv: argv, Env: os.Environ(), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	return withSignals(func(started func(*os.Process)) error {
		c.Started = started
		return ns.Run(holder, c)
	})
}

// withSignals passes our signals on to the command that run starts, and turns its end into our exit code.
func withSignals(run func(started func(*os.Process)) error) error {
	forward := []os.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGINT, unix.SIGQUIT}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forward...)
	defer signal.Stop(signals)
	done := make(chan struct{})
	defer close(done)
	err := run(func(p *os.Process) { go pass(p, signals, done) })
	if code, ran := ns.ExitCode(err); ran {
		if code == 0 {
			return nil
		}
		return exitError(code)
	}
	return err
}

func pass(p *os.Process, signals <-chan os.Signal, done <-chan struct{}) {
	// The terminal sends its keys' signals to the command as well, as it is in our process group.
	terminal := term.IsTerminal(int(os.Stdin.Fd()))
	for {
		select {
		case s := <-signals:
			if !terminal || (s != unix.SIGINT && s != unix.SIGQUIT) {
				// A command that has just ended needs no signal.
				_ = p.Signal(s)
			}
		case <-done:
			return
		}
	}
}
